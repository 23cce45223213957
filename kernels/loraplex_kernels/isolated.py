"""The self-check in a process of its own: a kernel that never ran anywhere may take it down.

An illegal access leaves a CUDA context unusable; elsewhere it ends the process. Either way the
child starts anew behind the kernel that did it, and that kernel has failed.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal, NamedTuple, assert_never

import torch

from loraplex_kernels.cases import Case, ModelShapes, Scale, cases
from loraplex_kernels.check import Outcome, check, failed_outcome
from loraplex_kernels.dispatch import interpreted_ops
from loraplex_kernels.native import NativeOps, load_library
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.timing import timer_for

SECONDS_A_CASE = 300.0
"""Compiling included; what takes longer hangs."""

Progress = Callable[[int, int], None]
"""Called with (cases done, cases in all)."""


OpsName = Literal["torch", "native", "triton", "interpreter"]


@dataclass(frozen=True, slots=True)
class Task:
    """What to check."""

    ops: OpsName
    device: str
    dtype: torch.dtype
    shapes: ModelShapes
    max_rank: int
    scale: Scale
    is_timed: bool
    cache: Path  # of the compiled CPU ops

    def cases(self) -> list[Case]:
        device = torch.device(self.device)
        return list(cases(self.shapes, device, self.dtype, self.max_rank, self.scale))

    def run(self, selected: list[Case]) -> Iterator[Outcome]:
        """In this process; BuildError where the CPU ops cannot be compiled."""
        device = torch.device(self.device)
        timer = timer_for(device) if self.is_timed else None
        return check(selected, self._ops(device), self.dtype, timer)

    def _ops(self, device: torch.device) -> Ops:
        match self.ops:
            case "torch":
                return TorchOps()
            case "native":
                return NativeOps(load_library(self.cache))
            case "interpreter":
                return interpreted_ops()
            case "triton":
                return _every_kernel(device)
        assert_never(self.ops)


def _every_kernel(device: torch.device) -> Ops:
    from loraplex_kernels.gpu.ops import TritonOps
    from loraplex_kernels.gpu.paths import EVERY_KERNEL
    from loraplex_kernels.gpu.target import target_of

    return TritonOps(device, target_of(device), EVERY_KERNEL)


class IsolationError(Exception):
    """The child ended before its first case, so that nothing is known of any kernel."""


Child = Callable[[Connection, Task, list[int]], None]

LOST = "lost"
"""A child's last word after an outcome: that case left the device beyond use."""


def is_lost(device: str) -> bool:
    """Whether the CUDA context is beyond use."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def check_in_child(
    results: Connection,
    task: Task,
    indices: list[int],
    is_lost: Callable[[str], bool] = is_lost,
) -> None:
    """Send None, then the outcomes of these cases, and LOST where one loses the device.

    A string instead of the None says why it cannot begin. Whether the device is lost is found out
    before an outcome is sent: should that hang or end the process, it counts for the same case.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _silence()
    torch.set_num_threads(1)
    try:
        wanted = task.cases()
        outcomes = task.run([wanted[index] for index in indices])
    except Exception as error:  # an import, a driver: the parent's to tell
        results.send(f"{type(error).__name__}: {error}")
        return
    results.send(None)
    for outcome in outcomes:
        lost = outcome.failure is not None and is_lost(task.device)
        results.send(outcome)
        if lost:
            results.send(LOST)
            os._exit(0)  # to tear a lost context down may hang or abort


def _silence() -> None:
    """Compilers and drivers write as they like; what counts is sent."""
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)


def run_isolated(
    task: Task,
    progress: Progress = lambda done, total: None,
    child: Child = check_in_child,
    seconds_a_case: float = SECONDS_A_CASE,
) -> Iterator[Outcome]:
    """`task.run` of all its cases, in a child.

    A kernel that ends the child has failed in that case, and its later cases are left out.
    Raises IsolationError.
    """
    wanted = task.cases()
    left = list(range(len(wanted)))
    while left:
        culprit = wanted[left[0]].kernel
        ended: _Ending | None = None
        with _started(child, task, left) as (process, results):
            for outcome in _received(results, seconds_a_case):
                if outcome is None:
                    break
                culprit = outcome.kernel
                del left[0]
                yield outcome
                progress(len(wanted) - len(left), len(wanted))
            else:
                ended = _how_it_ended(process)
        if left and ended is not None:
            culprit = wanted[left[0]].kernel
            yield failed_outcome(wanted[left[0]], ended.words, ended.is_lasting)
        left = [index for index in left if wanted[index].kernel != culprit]
    progress(len(wanted), len(wanted))


@contextmanager
def _started(
    child: Child, task: Task, indices: list[int]
) -> Iterator[tuple[SpawnProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, task, indices), daemon=True)
    with _without_interrupts(), _interpreting(task.ops == "interpreter"):
        process.start()
    sender.close()
    try:
        yield process, results
    finally:
        process.kill()
        process.join()
        results.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started here leaves Ctrl-C to its parent from its first moment on.

    It inherits the blocked signal. The parent gets one of meanwhile at the end, whichever of its
    threads the system had chosen for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # where it starts later, it unblocks the signal
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if noted:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _interpreting(is_wanted: bool) -> Iterator[None]:
    """A process started here finds this before anything in it imports triton."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if is_wanted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _received(results: Connection, seconds_a_case: float) -> Iterator[Outcome | None]:
    """Until the child ends, or is silent for too long; None: its last outcome lost the device."""
    is_ready = False
    while results.poll(seconds_a_case):
        try:
            message = results.recv()
        except EOFError:
            break
        if message is None:
            is_ready = True
        elif is_ready:
            yield None if message == LOST else message
        else:
            raise IsolationError(message)
    if not is_ready:
        raise IsolationError("its process ended before the first case")


class _Ending(NamedTuple):
    words: str
    is_lasting: bool


def _how_it_ended(process: SpawnProcess) -> _Ending:
    """Killed: by a system short of memory. A kernel may be slow where others use the device too."""
    process.join(timeout=1)
    code = process.exitcode
    if code is None:
        return _Ending("did not return", False)
    if code < 0:
        name = signal.Signals(-code).name
        return _Ending(f"ended its process with {name}", name != "SIGKILL")
    return _Ending(f"ended its process with exit code {code}", True)
