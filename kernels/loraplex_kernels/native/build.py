"""Compile `ops.cpp` and its headers with the machine's C++ compiler: one library a processor."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
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


class BuildError(Exception):
    """No compiler, or one that refused; the message is one line."""


def load_library(cache_dir: Path) -> ctypes.CDLL:
    """The compiled ops, built into `cache_dir` unless they are there already.

    torch must have been imported before, so that both share one OpenMP runtime and its threads.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise BuildError("no C++ compiler found")
    target = cache_dir / f"ops-{_fingerprint(compiler)}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"the compiled ops cannot be kept or loaded: {error}") from error


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = (path.read_bytes() for path in (SOURCE, *HEADERS))
    parts = (*sources, " ".join(FLAGS).encode(), version, _processor().encode())
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
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        built = Path(work) / "ops.so"
        result = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise BuildError(f"{Path(compiler).name} failed: {lines[0]}")
        os.replace(built, target)
