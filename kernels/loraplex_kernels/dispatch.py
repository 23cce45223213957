"""The ops for a device. What a device does not need is not imported: triton has its demands."""

import logging
from pathlib import Path

import torch

from loraplex_kernels.native import BuildError, NativeOps, load_library
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps

log = logging.getLogger(__name__)


def cpu_ops(cache_dir: Path) -> Ops:
    """The compiled ops, built into `cache_dir` at first use; torch's own where that fails."""
    try:
        return NativeOps(load_library(cache_dir))
    except BuildError as error:
        log.warning("the CPU ops run in plain torch, which is slower: %s", error)
        return TorchOps()


def multiplies_codes(ops: Ops, dtype: torch.dtype) -> bool:
    """Whether CPU ops have a product with 4-bit codes in this type, quicker than with a copy."""
    return dtype == torch.bfloat16 and isinstance(ops, NativeOps) and ops.multiplies_codes


def interpreted_ops() -> Ops:
    """The Triton kernels in Triton's interpreter; `TRITON_INTERPRET=1` was set before."""
    from loraplex_kernels.gpu import interpreter
    from loraplex_kernels.gpu.ops import TritonOps
    from loraplex_kernels.gpu.paths import EVERY_KERNEL

    interpreter.repair()
    return TritonOps(torch.device("cpu"), "interpreter", EVERY_KERNEL)
