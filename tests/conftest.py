"""Before anything imports triton: kernels run in its interpreter, on CPU tensors."""

import os
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lifecycle")
    group.addoption(
        "--operations", type=int, default=400, help="operations of each lifecycle test (400)"
    )
    group.addoption("--run-log", type=Path, help="write down here what the lifecycle tests did")
