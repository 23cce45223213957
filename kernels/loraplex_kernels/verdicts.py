"""Which kernels failed the self-check here: found out once, and kept in the user's cache."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loraplex_kernels.cases import ModelShapes
from loraplex_kernels.check import Outcome

log = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "kernels"
"""In the user's cache."""
_PACKAGE = Path(__file__).parent
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


@dataclass(frozen=True, slots=True)
class Environment:
    """What a kernel's result may depend on beside its arguments."""

    sources: str  # sha256 of this package's Python files and configurations
    triton_version: str
    torch_version: str
    bitsandbytes_version: str
    device: str
    capability: str
    driver: str

    @classmethod
    def of(cls, device: torch.device) -> "Environment":
        is_cuda = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if is_cuda else None
        return cls(
            sources=hash_of_sources(),
            triton_version=_version("triton"),
            torch_version=torch.__version__,
            bitsandbytes_version=_version("bitsandbytes"),
            device=properties.name if properties else "cpu",
            capability=f"{properties.major}.{properties.minor}" if properties else "",
            driver=_driver() if is_cuda else "",
        )


@dataclass(frozen=True, slots=True)
class VerdictKey:
    """What one verdict holds for."""

    environment: Environment
    shapes: ModelShapes
    dtype: str
    max_rank: int

    @property
    def digest(self) -> str:
        """The model's name changes no kernel."""
        facts = asdict(replace(self, shapes=replace(self.shapes, name="")))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


Failures = Mapping[str, str]
"""By kernel, why it failed; empty: all passed."""


def failures_of(outcomes: Iterable[Outcome]) -> Failures:
    """Each failed kernel with what was wrong in its first failed case."""
    failures: dict[str, str] = {}
    for outcome in outcomes:
        if outcome.failure is not None:
            where = f"{outcome.case}, {outcome.num_rows} rows"
            failures.setdefault(outcome.kernel, f"{outcome.failure} ({where})")
    return failures


def is_conclusive(outcomes: Sequence[Outcome]) -> bool:
    """Whether they tell of kernels, and not of memory or time that was short.

    Where every kernel failed it is the environment that did, as without a C compiler.
    """
    has_passed = failures_of(outcomes).keys() != {outcome.kernel for outcome in outcomes}
    return has_passed and all(outcome.is_lasting for outcome in outcomes)


def failed_kernels(
    key: VerdictKey, cache: Path, check: Callable[[], Iterable[Outcome]]
) -> Failures:
    """From the cache, or by `check` and into the cache."""
    known = load_verdict(key, cache)
    return known if known is not None else save_verdict(key, cache, check())


def load_verdict(key: VerdictKey, cache: Path) -> Failures | None:
    """None where there is none, or none that can be read."""
    try:
        stored = json.loads(_path(key, cache).read_bytes())
        if stored["format"] != FORMAT:
            return None
        return {str(kernel): str(why) for kernel, why in stored["failed"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def save_verdict(key: VerdictKey, cache: Path, outcomes: Iterable[Outcome]) -> Failures:
    """Stored only where it is conclusive."""
    outcomes = list(outcomes)
    failures = failures_of(outcomes)
    if is_conclusive(outcomes):
        write_json(
            _path(key, cache),
            {
                "format": FORMAT,
                "for": asdict(key),
                "passed": sorted({outcome.kernel for outcome in outcomes} - failures.keys()),
                "failed": failures,
            },
        )
    return failures


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all; where a cache cannot be written, the work is done again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            whole = Path(work) / path.name
            whole.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(whole, path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.json")]):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _path(key: VerdictKey, cache: Path) -> Path:
    return cache / FOLDER / f"verdict-{key.digest[:32]}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _driver() -> str:
    """The kernel module's own words; empty where it has none to read, as under WSL."""
    for path in _DRIVERS:
        try:
            return Path(path).read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
    return ""
