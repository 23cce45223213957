"""NF4 codes kept between starts: making them takes a CPU seconds, or minutes for billions."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraplex_kernels.nf4 import NF4Weight
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

FORMAT = 1
_PARTS = ("codes", "absmax", "code")


class NF4Cache:
    """One safetensors file for a base, named after its identity: the content and the settings.

    Beside it lies its sha256, checked at every start: these bytes become the model. Mutable:
    `_fresh`, the tensors that were made in this start, for `save`.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / f"{identity}.{FORMAT}.safetensors"
        self._file = _open(self._path)
        self._kept = frozenset() if self._file is None else frozenset(self._file.keys())
        self._fresh: dict[str, Tensor] = {}

    def weight(self, name: str, make: Callable[[], NF4Weight]) -> NF4Weight:
        """What is kept under `name`, mapped rather than read; else made, and kept by `save`."""
        names = [f"{name}.{part}" for part in _PARTS]
        if self._file is not None and self._kept.issuperset(names):
            return NF4Weight(*(self._file.get_tensor(part) for part in names))
        weight = make()
        # The levels are one tensor for all weights, which the format cannot say.
        parts = (weight.codes, weight.absmax, weight.code.clone())
        self._fresh |= zip(names, parts, strict=True)
        return weight

    def save(self) -> None:
        """Keep what was made in this start; a disk that cannot is no reason not to serve."""
        if not self._fresh:
            return
        try:
            _write(self._path, self._fresh)
        except (OSError, SafetensorError) as error:
            log.warning("the 4-bit weights are not kept for the next start: %s", error)
        self._fresh.clear()


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        fresh = Path(work) / path.name
        save_file(dict(tensors), fresh)
        digest = Path(work) / "sha256"
        digest.write_text(_sha256(fresh))
        os.replace(fresh, path)
        os.replace(digest, _digest_of(path))


def _open(path: Path) -> Any:
    """None when there is no file, or not the one that was written."""
    if not path.exists():
        return None
    try:
        if _digest_of(path).read_text() != _sha256(path):
            raise OSError("its bytes have changed")
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        log.warning("quantising anew: the kept 4-bit weights cannot be used: %s", error)
        return None


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
