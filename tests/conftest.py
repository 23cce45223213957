"""Before anything imports triton: kernels run in its interpreter, on CPU tensors."""

import os
from pathlib import Path

import pytest
from loraplex.config import cache_dir

os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lifecycle")
    group.addoption(
        "--operations", type=int, default=400, help="operations of each lifecycle test (400)"
    )
    group.addoption("--run-log", type=Path, help="write down here what the lifecycle tests did")


@pytest.fixture(scope="session")
def native_cache() -> Path:
    """Where the servers of tests look for the compiled ops, too: they are compiled once for all."""
    return cache_dir() / "native"
