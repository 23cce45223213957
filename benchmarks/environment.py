"""On what the figures were measured, so that they can be compared, or seen not to be."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("loraplex", "torch", "triton", "transformers", "peft", "bitsandbytes", "grpcio")
ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, object]:
    """Nothing in it names the machine, its user or its folders."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def in_words(about: Mapping[str, Any]) -> str:
    """What of `environment()` a reader of a table must know."""
    packages = (f"{name} {found}" for name, found in about["packages"].items() if found)
    return (
        f"{about['cpu']}, {about['cores']} cores, load {about['load_before']} before the start; "
        f"{', '.join(packages)}; revision {about['revision']}; {about['date']}."
    )


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path) -> str:
    """As Linux calls it; what Python knows, elsewhere."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit, marked where the tree differs from it; None outside a checkout."""
    revision, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain")
    return f"{revision}, with changes" if revision and changes else revision


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
