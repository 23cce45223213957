"""The compiled CPU ops, and random numbers; one thread, as the machine may be busy."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraplex_kernels.native import NativeOps, load_library

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_library(native_cache: Path) -> ctypes.CDLL:
    return load_library(native_cache)


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
