"""The self-check finds the kernel that is wrong, whichever way, and no other."""

from collections.abc import Callable

import pytest
import torch
from loraplex_kernels.cases import TINY, Case, CaseMaker, ModelShapes, Prepared, cases
from loraplex_kernels.check import Outcome, check
from loraplex_kernels.gpu.ops import KERNELS
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.timing import copy_bytes_per_second, time_on_cpu
from loraplex_kernels.verdicts import failures_of

from tests.kernels.faulty import FAULTS, Fault, FaultyOps, is_a_little_wrong

CPU = torch.device("cpu")
SHAPES = ModelShapes("tiny", 128, 192, 6, 2, 32, 2)


def checked(ops: TorchOps, dtype: torch.dtype = torch.float32) -> list[Outcome]:
    return list(check(cases(SHAPES, CPU, dtype, scale=TINY), ops, dtype))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fault_is_found(kernel: str, fault: Fault) -> None:
    failures = failures_of(checked(FaultyOps(kernel, fault)))
    assert list(failures) == [kernel]
    assert failures[kernel].startswith(FAULTS[fault])


def test_right_ops_pass() -> None:
    outcomes = checked(TorchOps())
    assert failures_of(outcomes) == {}
    assert all(0 <= o.error < 1e-5 for o in outcomes if o.error is not None)
    assert None not in [o.error for o in outcomes]
    assert {o.seconds for o in outcomes} == {None}


def test_an_exception_is_one_short_line() -> None:
    class Wordy(TorchOps):
        def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
            raise ValueError("\n  at 12:3:\n" + "x" * 1000)

    failure = failures_of(checked(Wordy()))["silu_mul"]
    assert failure.startswith("ValueError: at 12:3: (")
    assert "\n" not in failure


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["torch", "triton"],
)
def test_too_little_memory_says_nothing_of_a_kernel(raised: Exception) -> None:
    class Full(TorchOps):
        def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
            raise raised

    failed = [outcome for outcome in checked(Full()) if outcome.failure is not None]
    assert {outcome.kernel for outcome in failed} == {"silu_mul"}
    assert not any(outcome.is_lasting for outcome in failed)


def test_a_case_that_cannot_be_prepared_fails() -> None:
    def make(form: GranuleForm) -> Prepared:
        raise RuntimeError("no such device")

    (outcome,) = check([Case("lora", "", 1, 1, make)], TorchOps(), torch.float32)
    assert outcome.failure == "RuntimeError: no such device"


def test_only_what_passed_is_timed() -> None:
    def timer(call: Callable[[], None]) -> float:
        call()
        return 0.5

    make = CaseMaker(SHAPES, CPU, torch.float32, 16)
    wanted = [make.silu_mul(4), make.add_rms_norm(4)]
    ops = FaultyOps("silu_mul", is_a_little_wrong)
    wrong, right = check(wanted, ops, torch.float32, timer)
    assert (wrong.seconds, wrong.bytes_per_second) == (None, None)
    assert (right.seconds, right.bytes_per_second) == (0.5, 2 * right.bytes_moved)


def test_times_are_positive() -> None:
    calls: list[None] = []
    assert time_on_cpu(lambda: calls.append(None)) >= 0
    assert len(calls) >= 4
    assert copy_bytes_per_second(CPU) > 0
