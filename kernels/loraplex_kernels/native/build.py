"""Compile `ops.cpp` and its headers with the machine's C++ compiler: one library a processor."""

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("ops.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))

# Sums may be reassociated, so that they vectorise; NaN and infinity keep their meaning.
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
)


PARTS = ("LORAPLEX_BF16", "LORAPLEX_F32")
"""Macros of ops.cpp: what is compiled side by side."""

SECONDS = 600.0
"""What the compiler may take; it needs some 10."""


class BuildError(Exception):
    """No compiler, or one that refused or hung; the message is one line."""


def is_built(cache_dir: Path) -> bool:
    """Whether `load_library` has nothing to compile: no compiler, or built before."""
    compiler = _compiler()
    return compiler is None or _target(compiler, cache_dir).exists()


def load_library(cache_dir: Path) -> ctypes.CDLL:
    """The compiled ops, built into `cache_dir` unless they are there already.

    torch must have been imported before, so that both share one OpenMP runtime and its threads.
    """
    compiler = _compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found")
    target = _target(compiler, cache_dir)
    try:
        if not target.exists():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"the compiled ops cannot be kept or loaded: {error}") from error


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _target(compiler: str, cache_dir: Path) -> Path:
    return cache_dir / f"ops-{_fingerprint(compiler)}.so"


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = (path.read_bytes() for path in (SOURCE, *HEADERS))
    parts = (*sources, " ".join((*FLAGS, *PARTS)).encode(), version, _processor().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on: a cache on a shared disk may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + SECONDS
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        start, built = [compiler, *FLAGS], Path(work) / "ops.so"
        parts = {part: str(Path(work) / f"{part}.o") for part in PARTS}
        source = ["-c", str(SOURCE), "-o"]
        _run([[*start, f"-D{part}", *source, to] for part, to in parts.items()], end)
        _run([[*start, *parts.values(), "-o", str(built)]], end)
        os.replace(built, target)


def _run(commands: Sequence[Sequence[str]], end: float) -> None:
    """All at once; none of them is left behind."""
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a driver's compiler and assembler are processes of their own
        )
        for command in commands
    ]
    name = Path(commands[0][0]).name
    try:
        for process in running:
            _, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
            if process.returncode != 0:
                lines = errors.strip().splitlines() or ["no message"]
                raise BuildError(f"{name} failed: {lines[0]}")
    except subprocess.TimeoutExpired:
        raise BuildError(f"{name} did not end within {SECONDS:.0f} seconds") from None
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stderr is not None
            process.stderr.close()
