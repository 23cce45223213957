"""An adapter in several files is sent as one, and what names no such files is refused."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loraplex_client.errors import AdapterFolderError
from loraplex_client.weights import CHUNK_BYTES, INDEX_NAME, Weights, find_weights
from safetensors.numpy import load, save_file

RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "layers.0.lora_A.weight": RNG.standard_normal((4, 100_003)).astype(np.float32),
    "layers.0.lora_B.weight": RNG.standard_normal((100, 4)).astype(np.float16),
    "layers.1.lora_A.weight": RNG.standard_normal((4, 7)).astype(np.float32),
    "layers.1.lora_B.weight": RNG.standard_normal((3, 4)).astype(np.float16),
}
SHARDS = [f"adapter_model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
FILES = dict(zip(TENSORS, [SHARDS[0], SHARDS[2], SHARDS[0], SHARDS[1]], strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in SHARDS:
        names = [name for name, file in FILES.items() if file == shard]
        save_file({n: TENSORS[n] for n in names}, tmp_path / shard, metadata={"format": "pt"})
    write_index(tmp_path, FILES)
    return tmp_path


def write_index(folder: Path, files: Mapping[str, object]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_shards_are_one_file(folder: Path) -> None:
    weights = find_weights(folder)
    chunks = list(weights.read())
    data = b"".join(chunks)
    assert max(map(len, chunks)) <= CHUNK_BYTES
    assert len(data) == weights.size
    assert hashlib.sha256(data).hexdigest() == weights.sha256() == find_weights(folder).sha256()
    found = load(data)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name], tensor)


def test_bytes_from_any_offset_on(folder: Path) -> None:
    weights = find_weights(folder)
    data = b"".join(weights.read())
    ends = [len(weights.head)]
    for piece in weights.pieces:
        ends.append(ends[-1] + piece.size)
    for offset in {0, 1, len(data)} | {end + step for end in ends[:-1] for step in (-1, 0, 1)}:
        assert b"".join(weights.read(offset)) == data[offset:], offset


def test_one_file_comes_before_its_parts(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"whole")
    assert b"".join(find_weights(folder).read()) == b"whole"


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]} is missing"),
        (lambda f: (f / SHARDS[1]).write_bytes(b""), f"{SHARDS[1]} is not a safetensors file"),
        (lambda f: (f / SHARDS[1]).write_bytes(b"\xff" * 99), "is not a safetensors file"),
        (lambda f: (f / SHARDS[1]).write_bytes(b"\2" + bytes(7) + b"[]"), "not a safetensors"),
        (lambda f: cut(f / SHARDS[0]), f"{SHARDS[0]} is not a safetensors file"),
        (
            lambda f: (f / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
            "git lfs pull",
        ),
        (lambda f: write_index(f, {}), "is not an index"),
        (lambda f: (f / INDEX_NAME).write_text("["), "is not an index"),
        (lambda f: (f / INDEX_NAME).write_text("{}"), "is not an index"),
        (lambda f: write_index(f, {**FILES, "x": 3}), "is not an index"),
        (lambda f: write_index(f, {**FILES, "x": "../other.safetensors"}), "is not an index"),
        (lambda f: write_index(f, {**FILES, "x": "secrets.txt"}), "is not an index"),
        (lambda f: write_index(f, {**FILES, "x": SHARDS[1]}), f"{SHARDS[1]} lacks x"),
        (lambda f: write_index(f, dict(list(FILES.items())[1:])), "denies it"),
    ],
)
def test_what_is_no_adapter_in_parts(folder: Path, spoil: Spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(AdapterFolderError, match=message):
        find_weights(folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_weights_without_a_byte() -> None:
    assert list(Weights(()).read()) == []
