"""A child process that ends when the benchmark does, however the benchmark ends."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BENCHMARKS = Path(__file__).resolve().parent
SECONDS_TO_END = 10.0

_NOT_INHERITED = frozenset({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"})


class BenchmarkError(Exception):
    """Why there are no figures, in one line."""


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first that is no group itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def environment() -> dict[str, str]:
    """The benchmark's own variables but those of how OpenMP's threads wait.

    That is each system's own affair: PASSIVE, which Loraplex takes for itself, is slow where
    threads meet after every operation.
    """
    return {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}


class Child:
    """`python -m MODULE ...`, spoken to in lines; what it writes to stderr goes to a file.

    It has a session of its own, so that Ctrl-C reaches the benchmark alone, which then ends it.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, python: str = sys.executable
    ) -> None:
        self._name = name
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=BENCHMARKS,
                env=environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def read(self) -> str:
        """Its next line; BenchmarkError, with its last words, if it has ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _failure(self) -> BenchmarkError:
        said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        return BenchmarkError(f"{self._name} ended too early: {said[-1]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=SECONDS_TO_END)
        finally:
            self._process.kill()
            self._process.wait()
