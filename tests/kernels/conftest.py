"""The compiled CPU ops, built once for all tests, and random numbers; one thread, as the machine
may be busy."""

import ctypes

import pytest
import torch
from loraplex_kernels.native import load_library

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_library(tmp_path_factory.mktemp("native"))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)
