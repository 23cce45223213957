"""The self-check: a case's result against plain fp32 maths on the same device, and its time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.cases import Case, Prepared
from loraplex_kernels.ops import Ops

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error against the largest value, by the activations' dtype."""

Timer = Callable[[Callable[[], None]], float]
"""Seconds of one call, warm."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case on one device. `failure` says in a few words what is wrong; None: it passed."""

    kernel: str
    case: str
    num_rows: int
    error: float | None  # max |error| / max |expected|; None where there was no finite result
    failure: str | None
    is_lasting: bool  # False: memory or time was short, and it may pass another time
    seconds: float | None  # None: not timed
    bytes_moved: int

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.seconds is None else self.bytes_moved / self.seconds


def check(
    cases: Iterable[Case], ops: Ops, dtype: torch.dtype, timer: Timer | None = None
) -> Iterator[Outcome]:
    """Each case's outcome as it comes; only what passes is timed. Raises nothing."""
    for case in cases:
        yield _outcome(case, ops, dtype, timer)


def failed_outcome(case: Case, failure: str, is_lasting: bool = True) -> Outcome:
    return Outcome(
        kernel=case.kernel,
        case=case.name,
        num_rows=case.num_rows,
        error=None,
        failure=failure,
        is_lasting=is_lasting,
        seconds=None,
        bytes_moved=case.bytes_moved,
    )


def _outcome(case: Case, ops: Ops, dtype: torch.dtype, timer: Timer | None) -> Outcome:
    try:
        prepared = case.prepare(ops.granule_form(dtype))
        error, failure = _judge(prepared, ops, LIMITS[dtype])
        seconds = None
        if timer is not None and failure is None:
            seconds = timer(lambda: prepared.call(ops))
    except Exception as raised:  # whatever a compiler or a driver comes up with
        if is_want_of_memory(raised):
            return failed_outcome(case, "not enough free memory on the device", is_lasting=False)
        return failed_outcome(case, brief(raised))
    return Outcome(
        kernel=case.kernel,
        case=case.name,
        num_rows=case.num_rows,
        error=error,
        failure=failure,
        is_lasting=True,
        seconds=seconds,
        bytes_moved=case.bytes_moved,
    )


def _judge(prepared: Prepared, ops: Ops, limit: float) -> tuple[float | None, str | None]:
    """The error, and what is wrong."""
    prepared.poison()
    expected = prepared.expected()
    result = prepared.run(ops)
    if not bool(result.isfinite().all()):
        return None, "a result that is not finite, or was not written"
    error = relative_error(result, expected)
    if not prepared.is_intact():
        return error, "wrote outside its output"
    if error > limit:
        return error, f"off by {error:.2e}, where {limit:.0e} is allowed"
    return error, None


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max |error| / max |expected|."""
    return float((result - expected).abs().max() / expected.abs().max())


def is_want_of_memory(raised: Exception) -> bool:
    """Torch has a class for it; Triton's `Error [CUDA]: out of memory` is a bare RuntimeError."""
    return isinstance(raised, RuntimeError) and "out of memory" in str(raised).lower()


def brief(raised: Exception) -> str:
    """`OutOfResources: out of resource: shared memory`: the first line, cut short."""
    lines = [line.strip() for line in str(raised).splitlines() if line.strip()]
    return f"{type(raised).__name__}: {lines[0]}"[:160] if lines else type(raised).__name__
