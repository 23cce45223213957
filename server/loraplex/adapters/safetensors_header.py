"""A safetensors file's header, read by hand: length, JSON, and every tensor's bytes accounted for.

The library alone accepts duplicate keys, unknown fields, shapes like `[2**40, 0]`, empty files and
NaN, so it is asked only for a second opinion.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open

from loraplex.errors import AdapterInvalidError

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 20_000
_LENGTH_BYTES = 8  # a little-endian uint64 before the header
_CHUNK_BYTES = 4 << 20
_TENSOR_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class _Dtype:
    """An element type as unsigned integers; all exponent bits set means NaN or Inf."""

    code: str
    itemsize: int  # bytes
    exponent: int


_DTYPES = {
    "F16": _Dtype("<u2", 2, 0x7C00),
    "BF16": _Dtype("<u2", 2, 0x7F80),
    "F32": _Dtype("<u4", 4, 0x7F80_0000),
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file: `start` and `end` are byte positions in the file itself."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class _DuplicateKeyError(ValueError):
    """A JSON object that names one key twice."""


def shown(name: str) -> str:
    """A name from an untrusted file, fit for a message: valid UTF-8, and not endless."""
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else f"{text[:200]}..."


def load_json_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys or NaN; `what` names it in the AdapterInvalidError."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_json)
    except _DuplicateKeyError as error:
        raise AdapterInvalidError(what, f"the key {error} stands there twice") from None
    except (ValueError, RecursionError):
        raise AdapterInvalidError(what, "is not valid JSON") from None
    if not isinstance(value, dict):
        raise AdapterInvalidError(what, "is not a JSON object")
    return value


def read_header(path: Path) -> list[TensorEntry]:
    """The file's tensors in the order of their bytes, which they fill without hole or overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = _header_bytes(file, size)
    data_start = _LENGTH_BYTES + len(raw)
    try:
        fields = load_json_object(raw.decode("utf-8"), "safetensors header")
    except UnicodeDecodeError:
        raise _bad_file("is not safetensors: the header is not UTF-8") from None
    _check_metadata(fields.pop("__metadata__", {}))
    if not fields:
        raise _bad_file("holds no tensors")
    if len(fields) > MAX_TENSORS:
        raise _bad_file(f"holds {len(fields)} tensors, more than {MAX_TENSORS}")
    entries = [_entry(name, value, data_start) for name, value in fields.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_layout(entries, data_start, size)
    return entries


def check_finite(path: Path, entries: list[TensorEntry]) -> None:
    """Every element is finite; reads the file in chunks, so that memory stays bounded."""
    with path.open("rb") as file:
        for entry in entries:
            file.seek(entry.start)
            if not _is_finite(file, entry):
                raise AdapterInvalidError(shown(entry.name), "holds NaN or Inf")


def check_second_opinion(path: Path, entries: list[TensorEntry]) -> None:
    """The library opens the file too and sees the same tensors."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise _bad_file(f"is refused by the safetensors library: {shown(str(error))}") from None
    if names != {entry.name for entry in entries}:
        raise _bad_file("the safetensors library sees other tensors in it")


def _bad_file(message: str) -> AdapterInvalidError:
    return AdapterInvalidError(WEIGHTS_NAME, message)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise _DuplicateKeyError(shown(name))
        fields[name] = value
    return fields


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _header_bytes(file: BinaryIO, size: int) -> bytes:
    if size < _LENGTH_BYTES:
        raise _bad_file(f"is not safetensors: {size} bytes are too few for a header")
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise _bad_file(
            f"is not safetensors: a header of {length} bytes, where the file holds"
            f" {size - _LENGTH_BYTES} and {MAX_HEADER_BYTES} are the most allowed"
        )
    raw = file.read(length)
    if raw[:1] != b"{":
        raise _bad_file("is not safetensors: the header does not begin with {")
    return raw


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterInvalidError("__metadata__", "must map strings to strings")


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    key = shown(name)
    if not isinstance(value, dict) or value.keys() != _TENSOR_FIELDS:
        raise AdapterInvalidError(key, "must have dtype, shape and data_offsets, and nothing else")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        text = shown(dtype) if isinstance(dtype, str) else "no text"
        raise AdapterInvalidError(key, f"dtype must be F16, BF16 or F32, not {text}")
    shape = _sizes(value["shape"])
    if shape is None or len(shape) not in (1, 2) or 0 in shape:
        raise AdapterInvalidError(key, "shape must have two dimensions, neither of them zero")
    offsets = _sizes(value["data_offsets"])
    if offsets is None or len(offsets) != 2:
        raise AdapterInvalidError(key, "data_offsets must be a start and an end")
    start, end = offsets
    if end - start != prod(shape) * _DTYPES[dtype].itemsize:
        raise AdapterInvalidError(key, "data_offsets do not span the bytes of its shape and dtype")
    return TensorEntry(name, dtype, shape, data_start + start, data_start + end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 up to what an int64 holds; None when it is anything else."""
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return None
    return tuple(value)


def _check_layout(entries: list[TensorEntry], position: int, size: int) -> None:
    for entry in entries:
        if entry.start != position:
            kind = "overlap another tensor's" if entry.start < position else "leave a hole before"
            raise AdapterInvalidError(shown(entry.name), f"data_offsets {kind} its bytes")
        position = entry.end
    if position != size:
        raise _bad_file(f"has {size} bytes, but its header describes {position}")


def _is_finite(file: BinaryIO, entry: TensorEntry) -> bool:
    dtype = _DTYPES[entry.dtype]
    left = entry.end - entry.start
    while left:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if len(chunk) != min(left, _CHUNK_BYTES):
            raise _bad_file("ended while it was read")
        bits = np.frombuffer(chunk, dtype=dtype.code)
        if np.any((bits & dtype.exponent) == dtype.exponent):
            return False
        left -= len(chunk)
    return True
