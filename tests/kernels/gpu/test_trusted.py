"""What a server gets: the kernels that passed here, and a word on each that did not."""

import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from loraplex_kernels.cases import TINY, CaseMaker, ModelShapes, cases
from loraplex_kernels.check import Outcome, check
from loraplex_kernels.gpu.measured import save_paths
from loraplex_kernels.gpu.ops import KERNELS, TritonOps
from loraplex_kernels.gpu.paths import LinearPath, PathTable
from loraplex_kernels.gpu.target import target_of
from loraplex_kernels.gpu.trusted import measured_paths, triton_ops
from loraplex_kernels.isolated import IsolationError, Progress, Task
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.verdicts import Environment

from tests.kernels.faulty import FaultyOps, is_a_little_wrong

CPU = torch.device("cpu")
SHAPES = ModelShapes("tiny", 64, 128, 2, 1, 32, 2)
DTYPE = torch.float16


class Checker:
    """Checks some ops instead of the kernels, in this process; counts how often."""

    def __init__(self, ops: Ops) -> None:
        self.calls = 0
        self._ops = ops

    def __call__(self, task: Task, progress: Progress) -> Iterable[Outcome]:
        self.calls += 1
        assert (task.ops, task.shapes, task.dtype, task.max_rank) == ("triton", SHAPES, DTYPE, 32)
        return check(cases(SHAPES, CPU, torch.float32, 32, TINY), self._ops, torch.float32)


def ops_after(checker: Checker, cache: Path) -> TritonOps:
    return triton_ops(CPU, SHAPES, DTYPE, 32, cache, check=checker)


def test_a_kernel_that_fails_is_replaced_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checker = Checker(FaultyOps("attention", is_a_little_wrong))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        ops = ops_after(checker, tmp_path)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert warning.startswith("the kernel attention is not used, torch does its work: off by ")
        assert warning.endswith("; loraplex check --save tries again")
        assert not ops.can_be_captured
        case = CaseMaker(SHAPES, CPU, DTYPE, 32).attention("", [(20, 1), (9, 9)])
        prepared = case.prepare()
        assert torch.equal(prepared.run(ops), prepared.run(TorchOps()))
    assert checker.calls == 1


def test_what_passes_is_used_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ops = ops_after(Checker(TorchOps()), tmp_path)
    assert ops.can_be_captured
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_where_nothing_can_be_checked_nothing_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Checker):
        def __call__(self, task: Task, progress: Progress) -> Iterable[Outcome]:
            self.calls += 1
            raise IsolationError("no triton")

    checker = Broken(TorchOps())
    for _ in range(2):
        assert not ops_after(checker, tmp_path).can_be_captured
    assert checker.calls == 2
    for kernel in KERNELS:
        assert f"the kernel {kernel} is not used" in caplog.text


def test_linears_take_the_measured_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    make = CaseMaker(SHAPES, CPU, DTYPE, 32)
    case = make.nf4_linear(SHAPES.linears[1], [[0]], [-1] * 5)

    def result(ops: Ops) -> torch.Tensor:
        prepared = case.prepare()
        prepared.poison()
        return prepared.run(ops)

    unmeasured = ops_after(Checker(TorchOps()), tmp_path)
    assert "loraplex check --save" in caplog.text
    assert torch.equal(result(unmeasured), result(TorchOps()))
    caplog.clear()
    table = PathTable({(64, 64): ((1, LinearPath.FUSED),)})
    save_paths(Environment.of(CPU), str(DTYPE), tmp_path, table)
    measured = ops_after(Checker(TorchOps()), tmp_path)
    assert "loraplex check --save" not in caplog.text
    assert not torch.equal(result(measured), result(TorchOps()))  # rounded in another place


def test_only_paths_that_passed_are_measured() -> None:
    table = measured_paths(CPU, SHAPES, DTYPE, 16, frozenset(KERNELS))
    assert set(table.measured.values()) == {((1, LinearPath.BITSANDBYTES),)}


def test_the_target_of_a_cpu_is_the_interpreter() -> None:
    assert target_of(CPU) == "interpreter"
