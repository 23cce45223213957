"""A virtual environment a peer, outside the tree, made on first use of pinned packages.

`locks/NAME.txt` lists every package with its version; pip installs those alone and adds nothing of
its own (`--no-deps`), so that what a package asks for and must not have (vLLM: a torchvision of
another build) is left out by not being listed. An environment is complete when it holds a copy of
the list it was made from, and of the recipe of what was done after pip; any other is made anew.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from child import BenchmarkError

LOCKS = Path(__file__).resolve().parent / "locks"
_COMPLETE = "complete.txt"

Progress = Callable[[str, int, int], None]  # stage, done, in all


class Unavailable(BenchmarkError):
    """Why a peer takes no part, in one line."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where it lies, what it holds, and what is done beyond pip."""

    folder: Path
    lock: Path
    finish: Callable[["Environment", Progress], None] | None = None
    recipe: str = ""  # what `finish` does, in words that change when it does

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def ensure(self, progress: Progress) -> None:
        """Unavailable where it cannot be made; what was made so far is then left for a look."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with _held(self.folder.with_suffix(".lock"), progress):
            if not self._is_complete():
                self._make(progress)

    def run(self, command: Sequence[object], stage: str, heard: Callable[[str], None]) -> None:
        """A step of making it; `heard` gets each line. Unavailable if it fails."""
        run_logged(command, self.folder / "install.log", stage, heard, self._variables())

    def _is_complete(self) -> bool:
        try:
            return (self.folder / _COMPLETE).read_text(encoding="utf-8") == self._made_from()
        except (OSError, ValueError):
            return False

    def _made_from(self) -> str:
        return self.lock.read_text(encoding="utf-8") + self.recipe

    def _make(self, progress: Progress) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        progress("making a virtual environment", 0, 0)
        self.run([sys.executable, "-m", "venv", self.folder], "venv", lambda line: None)
        self._install(progress)
        if self.finish is not None:
            self.finish(self, progress)
        (self.folder / _COMPLETE).write_text(self._made_from(), encoding="utf-8")

    def _install(self, progress: Progress) -> None:
        lines = self.lock.read_text(encoding="utf-8").splitlines()
        total = sum(1 for line in lines if line and not line.startswith("#"))
        stage, done = f"installing {total} packages", 0

        def heard(line: str) -> None:
            nonlocal done
            done += line.startswith(("Collecting ", "Processing "))
            progress(stage, min(done, total), total)

        progress(stage, 0, total)
        pip = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        command = [*pip, "--progress-bar", "off", "--no-deps", "-r", self.lock]
        self.run(command, "pip", heard)

    def _variables(self) -> dict[str, str]:
        """Its own programs come first: cmake and ninja, where it has them."""
        return {**os.environ, "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run_logged(
    command: Sequence[object],
    log: Path,
    stage: str,
    heard: Callable[[str], None],
    variables: Mapping[str, str],
) -> None:
    """To its end, or to ours: then it and all that it has started are killed."""
    with log.open("a", encoding="utf-8") as written:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=variables,
            start_new_session=True,
        )
        assert process.stdout is not None
        said: list[str] = []
        try:
            for line in process.stdout:
                written.write(line)
                said = [*said[-200:], line.strip()]
                heard(line.strip())
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
    if code != 0:
        raise Unavailable(f"{stage} failed: {why(said)} (see {log})")


def why(said: Sequence[str]) -> str:
    """The line that tells most: the last error, or else the last that was said."""
    errors = [line for line in said if line.lower().startswith(("error:", "fatal", "cmake error"))]
    return (errors or [line for line in said if line] or ["it does not say why"])[-1]


@contextmanager
def _held(path: Path, progress: Progress) -> Iterator[None]:
    """By one process at a time; the kernel releases a dead one's."""
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that makes it", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
