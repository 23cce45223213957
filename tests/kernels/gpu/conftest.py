"""The interpreter's bf16 is wrong unless it is repaired; once is enough."""

import pytest
from loraplex_kernels.gpu.interpreter import repair


@pytest.fixture(scope="session", autouse=True)
def repaired() -> None:
    repair()
