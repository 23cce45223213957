"""The bytes of an adapter's weights, readable from any offset on: one safetensors file, or several.

An adapter in several files (`adapter_model.safetensors.index.json` names them) becomes one while it
is read: a header over all tensors, then each file's data as it lies. A safetensors file is 8 bytes
of its header's length, little-endian, the header in JSON, and the tensors' bytes without a gap
(https://huggingface.co/docs/safetensors), so that no library is needed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from loraplex_client.errors import AdapterFolderError

CHUNK_BYTES = 1 << 20
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

_MAX_JSON_BYTES = 16 << 20  # of a header or an index; servers take far less
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Piece:
    """So many bytes of a file."""

    path: Path
    start: int
    size: int

    def read(self, offset: int) -> Iterator[bytes]:
        """Its bytes from `offset` on. Opens the file for itself, so that readers may overlap."""
        left = self.size - offset
        with self.path.open("rb") as file:
            file.seek(self.start + offset)
            while left > 0:
                data = file.read(min(CHUNK_BYTES, left))
                if not data:
                    raise AdapterFolderError(f"{self.path} shrank while it was sent")
                yield data
                left -= len(data)


@dataclass(frozen=True, slots=True)
class Weights:
    """One safetensors file, as it is sent: `head`, then the pieces."""

    pieces: tuple[Piece, ...]
    head: bytes = b""

    @property
    def size(self) -> int:
        return len(self.head) + sum(piece.size for piece in self.pieces)

    def read(self, offset: int = 0) -> Iterator[bytes]:
        """The bytes from `offset` on, at most CHUNK_BYTES at a time."""
        for start in range(offset, len(self.head), CHUNK_BYTES):
            yield self.head[start : start + CHUNK_BYTES]
        offset = max(0, offset - len(self.head))
        for piece in self.pieces:
            if offset < piece.size:
                yield from piece.read(offset)
            offset = max(0, offset - piece.size)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for data in self.read():
            digest.update(data)
        return digest.hexdigest()


def find_weights(folder: Path) -> Weights:
    """What a PEFT folder holds; AdapterFolderError says what is wrong with it."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise AdapterFolderError(f"{folder} {what}; expected a folder saved by PEFT")
    if (path := folder / WEIGHTS_NAME).is_file():
        _refuse_pointer(path)
        return Weights((Piece(path, 0, path.stat().st_size),))
    if (index := folder / INDEX_NAME).is_file():
        return _merged(index)
    if (folder / "adapter_model.bin").exists():
        raise AdapterFolderError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read; "
            "save the adapter as safetensors (PEFT's default) and upload that"
        )
    raise AdapterFolderError(f"{folder} holds no {WEIGHTS_NAME}; expected a folder saved by PEFT")


def _merged(index: Path) -> Weights:
    """The files that an index names, as one."""
    files = _files_of(index)
    tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[Piece] = []
    offset = 0
    for name in sorted(set(files.values())):
        entries, data = _shard(index.parent / name)
        for tensor, (entry, begin, end) in entries.items():
            if files.get(tensor) != name:
                raise AdapterFolderError(f"{data.path} holds {tensor}, and {index} denies it")
            tensors[tensor] = {**entry, "data_offsets": [offset + begin, offset + end]}
        pieces.append(data)
        offset += data.size
    if missing := sorted(files.keys() - tensors.keys()):
        raise AdapterFolderError(f"{index.parent / files[missing[0]]} lacks {missing[0]}")
    header = json.dumps(tensors, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return Weights(tuple(pieces), len(header).to_bytes(8, "little") + header)


def _files_of(index: Path) -> dict[str, str]:
    """The file of each tensor; only files that lie beside the index."""
    _refuse_pointer(index)
    try:
        files = dict(_json_object(index.read_bytes()[:_MAX_JSON_BYTES])["weight_map"])
        if not files or not all(_is_plain(name) for name in files.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise AdapterFolderError(f"{index} is not an index of safetensors files") from None
    return files


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and PurePath(name).name == name and name.endswith(".safetensors")


def _shard(path: Path) -> tuple[dict[str, tuple[dict[str, Any], int, int]], Piece]:
    """A file's tensors, (entry, begin, end) by name, and where its data lies."""
    if not path.is_file():
        raise AdapterFolderError(f"{path} is missing")
    _refuse_pointer(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_JSON_BYTES, size - 8):
                raise ValueError
            header = _json_object(file.read(length))
        header.pop("__metadata__", None)
        data = Piece(path, 8 + length, size - 8 - length)
        entries = {name: (dict(entry), *_span(entry, data)) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise AdapterFolderError(f"{path} is not a safetensors file") from None
    return entries, data


def _span(entry: Mapping[str, Any], data: Piece) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    if not 0 <= int(begin) <= int(end) <= data.size:
        raise ValueError
    return int(begin), int(end)


def _json_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise AdapterFolderError(
                f"{path} is a git-lfs pointer, not the weights: run git lfs pull"
            )
