"""A kernel that ends its process has failed, and the others are checked all the same.

The real child, with the real kernels, is run by the tests of `loraplex check`.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from loraplex_kernels.cases import TINY, ModelShapes
from loraplex_kernels.isolated import (
    IsolationError,
    OpsName,
    Task,
    _how_it_ended,
    _received,
    _without_interrupts,
    run_isolated,
)
from loraplex_kernels.verdicts import failures_of

CHILDREN = '''
"""Found by name in a child, as a test's own functions would not be; quick to import."""

import atexit
import os
import signal
import time
from typing import NamedTuple


class Case(NamedTuple):
    kernel: str
    name: str = "some"
    num_rows: int = 3
    bytes_moved: int = 0


class Outcome(NamedTuple):
    kernel: str
    case: str
    num_rows: int
    failure: str | None


class Task:
    ops = "triton"

    def cases(self):
        return [Case(kernel) for kernel in ("norm", "rotary", "lora", "silu") for _ in range(3)]


def sabotaged(results, task, indices):
    """As when a kernel takes the process down, and when one leaves the device beyond use."""
    results.send(None)
    cases = task.cases()
    for index in indices:
        kernel = cases[index].kernel
        if index == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        results.send(Outcome(kernel, "some", 3, "bad" if index == 6 else None))
        if index == 6:
            results.send("lost")
            os._exit(0)


def ended_at_once(results, task, indices):
    os._exit(3)


def cannot_begin(results, task, indices):
    results.send("ModuleNotFoundError: no triton")


def aborts_after_its_last(results, task, indices):
    """A kernel loses the device in its last case, and the context's teardown aborts."""
    results.send(None)
    cases = task.cases()
    for index in indices:
        results.send(Outcome(cases[index].kernel, "some", 3, "bad" if index == 2 else None))
        if index == 2:
            results.send("lost")
            os.abort()


def hangs_after_its_last(results, task, indices):
    results.send(None)
    cases = task.cases()
    for index in indices:
        results.send(Outcome(cases[index].kernel, "some", 3, "bad" if index == 2 else None))
        if index == 2:
            results.send("lost")
            results.close()
            time.sleep(60)


def leaves_without_a_word(results, task, indices):
    results.send(None)
    os._exit(0)


class RunTask(Task):
    device = "cuda"

    def run(self, selected):
        atexit.register(os.abort)  # as a lost context's teardown
        for case in selected:
            yield Outcome(case.kernel, "some", 3, "bad" if case.kernel == "norm" else None)


def keeps_silent(results, task, indices):
    results.send(None)
    time.sleep(60)


def as_it_is(results, task, indices):
    from loraplex_kernels.isolated import check_in_child

    check_in_child(results, task, indices, is_lost=lambda device: True)


def ended_before_the_first(results, task, indices):
    results.send(None)
    os._exit(3)
'''


@pytest.fixture
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "children_of_test_isolated.py").write_text(CHILDREN)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module("children_of_test_isolated")
    del sys.modules["children_of_test_isolated"]


def test_each_kernel_that_ends_the_child_is_left_behind(children: ModuleType) -> None:
    reports: list[tuple[int, int]] = []
    task = children.Task()
    outcomes = list(run_isolated(task, lambda *done: reports.append(done), children.sabotaged))
    assert [outcome.kernel for outcome in outcomes] == [
        *["norm"] * 3,
        *["rotary"] * 2,
        "lora",
        *["silu"] * 3,
    ]
    assert failures_of(outcomes) == {
        "rotary": "ended its process with SIGSEGV (some, 3 rows)",
        "lora": "bad (some, 3 rows)",
    }
    assert reports == sorted(reports)
    assert reports[-1] == (12, 12)


@pytest.mark.parametrize("name", ["aborts_after_its_last", "hangs_after_its_last"])
def test_a_lost_device_condemns_no_other_kernel(children: ModuleType, name: str) -> None:
    outcomes = list(run_isolated(children.Task(), child=getattr(children, name)))
    assert failures_of(outcomes) == {"norm": "bad (some, 3 rows)"}
    assert [outcome.kernel for outcome in outcomes] == [
        *["norm"] * 3,
        *["rotary"] * 3,
        *["lora"] * 3,
        *["silu"] * 3,
    ]


def test_the_real_child_skips_the_teardown_of_a_lost_device(children: ModuleType) -> None:
    outcomes = list(run_isolated(children.RunTask(), child=children.as_it_is))
    assert failures_of(outcomes) == {"norm": "bad (some, 3 rows)"}
    assert len(outcomes) == 1 + 9


def test_who_leaves_without_a_word_has_failed(children: ModuleType) -> None:
    outcomes = list(run_isolated(children.Task(), child=children.leaves_without_a_word))
    assert {outcome.failure for outcome in outcomes} == {"ended its process with exit code 0"}


def test_ops_of_no_such_name_are_an_error(tmp_path: Path) -> None:
    shapes = ModelShapes("tiny", 128, 192, 6, 2, 32, 2)
    ops = cast(OpsName, "tirton")
    task = Task(ops, "cpu", torch.float32, shapes, 16, TINY, is_timed=False, cache=tmp_path)
    with pytest.raises(AssertionError, match="tirton"):
        task.run([])


def test_every_kernel_may_end_its_child(children: ModuleType) -> None:
    outcomes = list(run_isolated(children.Task(), child=children.ended_before_the_first))
    assert set(failures_of(outcomes)) == {"norm", "rotary", "lora", "silu"}
    assert {outcome.failure for outcome in outcomes} == {"ended its process with exit code 3"}


def test_a_child_that_cannot_begin_says_nothing_of_kernels(children: ModuleType) -> None:
    with pytest.raises(IsolationError, match="before the first case"):
        list(run_isolated(children.Task(), child=children.ended_at_once))
    with pytest.raises(IsolationError, match="no triton"):
        list(run_isolated(children.Task(), child=children.cannot_begin))


def test_silence_ends_the_waiting() -> None:
    results, sender = multiprocessing.Pipe(duplex=False)
    with results, sender:
        with pytest.raises(IsolationError):
            list(_received(results, seconds_a_case=0.0))
        sender.send(None)
        assert list(_received(results, seconds_a_case=0.0)) == []


def test_no_case_may_keep_silent(children: ModuleType) -> None:
    """It may be a busy device: not for good."""
    run = run_isolated(children.Task(), child=children.keeps_silent, seconds_a_case=1.5)
    outcome = next(iter(run))
    assert (outcome.failure, outcome.is_lasting) == ("did not return", False)


def test_how_a_child_ended() -> None:
    @dataclass
    class Ended:
        exitcode: int | None

        def join(self, timeout: float) -> None: ...

    def how(code: int | None) -> tuple[str, bool]:
        return _how_it_ended(cast(SpawnProcess, Ended(code)))

    assert how(None) == ("did not return", False)
    assert how(-11) == ("ended its process with SIGSEGV", True)
    assert how(-9) == ("ended its process with SIGKILL", False)
    assert how(1) == ("ended its process with exit code 1", True)
    assert how(0) == ("ended its process with exit code 0", True)


def test_an_interrupt_while_a_child_starts_comes_afterwards() -> None:
    came = 0
    try:
        with _without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            came += 1
        came += 1
    except KeyboardInterrupt:
        assert came == 1
    else:
        raise AssertionError("it was lost")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
