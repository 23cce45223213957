"""The Triton ops as a server uses them: only kernels that passed on this very device."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from loraplex_kernels.cases import SERVING, CaseMaker, ModelShapes
from loraplex_kernels.check import Outcome
from loraplex_kernels.gpu.measured import load_paths, measure
from loraplex_kernels.gpu.ops import KERNELS, TritonOps
from loraplex_kernels.gpu.paths import UNMEASURED, LinearPath, PathTable
from loraplex_kernels.gpu.target import target_of
from loraplex_kernels.isolated import IsolationError, Progress, Task, run_isolated
from loraplex_kernels.timing import timer_for
from loraplex_kernels.verdicts import Environment, Failures, VerdictKey, failed_kernels

log = logging.getLogger(__name__)


def triton_ops(
    device: torch.device,
    shapes: ModelShapes,
    dtype: torch.dtype,
    max_rank: int,
    cache: Path,
    progress: Progress = lambda done, total: None,
    check: Callable[[Task, Progress], Iterable[Outcome]] = run_isolated,
) -> TritonOps:
    """Checks each kernel over the model's shapes, unless the cache knows how that ended.

    Best before a model is loaded: the check takes some device memory in a process of its own.
    What failed is left to torch, with a warning.
    """
    environment = Environment.of(device)
    key = VerdictKey(environment, shapes, str(dtype), max_rank)
    task = Task(
        ops="triton",
        device=str(device),
        dtype=dtype,
        shapes=shapes,
        max_rank=max_rank,
        scale=SERVING,
        is_timed=False,
        cache=cache,
    )
    try:
        failures = failed_kernels(key, cache, lambda: check(task, progress))
    except IsolationError as error:
        failures = dict.fromkeys(KERNELS, f"the check could not be run: {error}")
    warn(failures)
    paths = load_paths(environment, str(dtype), cache)
    if paths is UNMEASURED:
        log.info("4-bit products go through bitsandbytes; loraplex check --save measures others")
    return TritonOps(device, target_of(device), paths, frozenset(failures))


def measured_paths(
    device: torch.device,
    shapes: ModelShapes,
    dtype: torch.dtype,
    max_rank: int,
    failed: frozenset[str],
    progress: Progress = lambda done, total: None,
) -> PathTable:
    """Timed now, on this device, among the kernels that did not fail."""
    usable = [LinearPath.BITSANDBYTES]
    if "nf4_linear" not in failed:
        usable.append(LinearPath.DEQUANTIZED)
        if "lora" not in failed:
            usable.append(LinearPath.FUSED)
    target = target_of(device)
    return measure(
        CaseMaker(shapes, device, dtype, max_rank),
        usable,
        lambda table: TritonOps(device, target, table, failed),
        timer_for(device),
        progress,
    )


def warn(failures: Failures) -> None:
    for kernel, why in sorted(failures.items()):
        log.warning(
            "the kernel %s is not used, torch does its work: %s; loraplex check --save tries again",
            kernel,
            why,
        )
