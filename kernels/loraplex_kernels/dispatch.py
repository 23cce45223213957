"""Choose the ops for a device."""

import logging
from pathlib import Path

import torch

from loraplex_kernels.native import BuildError, NativeOps, load_library
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps

log = logging.getLogger(__name__)


def choose_ops(device: torch.device, cache_dir: Path) -> Ops:
    """The fastest ops that work on `device`; torch's own where there is nothing better.

    On a CPU that is the compiled ones, built into `cache_dir` at first use.
    """
    if device.type != "cpu":
        return TorchOps()
    try:
        return NativeOps(load_library(cache_dir))
    except BuildError as error:
        log.warning("the CPU ops run in plain torch, which is slower: %s", error)
        return TorchOps()
