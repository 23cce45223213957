"""A Hugging Face checkpoint folder: which tensor lies in which file, and reading them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex.errors import ModelError
from loraplex.model.config import read_json

log = logging.getLogger(__name__)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Checkpoint:
    """Reads tensors by name, one file open at a time, never a whole file into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = dict(_index(folder))
        self._open: tuple[Path, safe_open] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        """Every tensor, file by file."""
        return list(self._file_of)

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def read(self, name: str) -> Tensor:
        path = self._file_of.get(name)
        if path is None:
            raise ModelError(f"the checkpoint in {self.folder} lacks the tensor {name}")
        try:
            tensor: Tensor = self._handle(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({name}): {error}") from error
        return tensor

    def read_float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor that must be of a floating type and of this very shape."""
        tensor = self.read(name)
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; "
                "float32, float16 and bfloat16 checkpoints are supported"
            )
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}"
            )
        return tensor

    def _handle(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1]


def _index(folder: Path) -> Iterator[tuple[str, Path]]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map")
        paths = {folder / str(file) for file in weight_map.values()}
    elif single.exists():
        paths = {single}
    else:
        raise ModelError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json"
        )
    for path in sorted(paths):
        if not path.exists():
            raise ModelError(f"{path} is missing, though the index names it")
        yield from ((name, path) for name in _names(path))


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short: {error}") from error


def base_identity(checkpoint: Checkpoint, settings: Mapping[str, object], cache_dir: Path) -> str:
    """sha256 over `settings` and every tensor's name, type, shape and bytes.

    The tensors' part is remembered in `cache_dir` by the files' paths, sizes and times of change.
    """
    tensors = _cached_tensor_digest(checkpoint, cache_dir)
    text = json.dumps({"settings": settings, "tensors": tensors}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _cached_tensor_digest(checkpoint: Checkpoint, cache_dir: Path) -> str:
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    cached = cache_dir / f"{key}.sha256"
    if cached.exists() and len(digest := cached.read_text().strip()) == 64:
        return digest
    digest = _tensor_digest(checkpoint)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        fresh = cached.with_suffix(f".{os.getpid()}.tmp")
        fresh.write_text(digest)
        fresh.replace(cached)
    except OSError as error:
        log.warning("the base model's identity is computed at every start: %s", error)
    return digest


def _tensor_digest(checkpoint: Checkpoint) -> str:
    """Independent of how the tensors are spread over files."""
    parts = {}
    for name in checkpoint.names:
        tensor = checkpoint.read(name).contiguous()
        total = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        parts[name] = total.hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
