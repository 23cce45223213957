"""The compiled CPU ops, built once for all tests, and random numbers; one thread, as the machine
may be busy."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from loraplex_kernels.native import NativeOps, load_library

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_library(tmp_path_factory.mktemp("native"))


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def team_ops(request: pytest.FixtureRequest, native_library: ctypes.CDLL) -> Iterator[NativeOps]:
    """On so many threads, which may be more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield NativeOps(native_library)
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)
