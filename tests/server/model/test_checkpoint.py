"""A checkpoint folder: tensors by name whatever file they lie in, and one identity for them all."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from loraplex.errors import ModelError
from loraplex.model.checkpoint import Checkpoint, base_identity
from safetensors.torch import save_file
from torch import Tensor

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(6.0).view(2, 3).bfloat16(),
    "b.bias": torch.arange(5.0).half(),
    "c.codes": torch.arange(7, dtype=torch.uint8),
}
INDEX = "model.safetensors.index.json"


def write(folder: Path, *shards: Mapping[str, Tensor]) -> Path:
    """One file for one shard, else numbered files and an index."""
    folder.mkdir(parents=True)
    if len(shards) == 1:
        save_file(dict(shards[0]), folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(shard), folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shard(*names: str) -> dict[str, Tensor]:
    return {name: TENSORS[name] for name in names}


def sharded(folder: Path) -> Path:
    return write(folder, shard("a.weight", "b.bias"), shard("b.weight", "c.codes"))


@pytest.fixture(params=["one file", "two files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "one file":
        return write(tmp_path / "model", TENSORS)
    return sharded(tmp_path / "model")


def test_tensors_are_read_by_name(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert "d.weight" not in checkpoint
    with pytest.raises(ModelError, match=r"d\.weight"):
        checkpoint.read("d.weight")


def test_a_float_tensor_has_the_shape_asked_for(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.read_float("b.weight", (2, 3)).dtype == torch.bfloat16
    with pytest.raises(ModelError, match=r"b\.weight has shape \[2, 3\].* makes it \[3, 2\]"):
        checkpoint.read_float("b.weight", (3, 2))
    with pytest.raises(ModelError, match=r"c\.codes has dtype uint8"):
        checkpoint.read_float("c.codes", (7,))


def remove_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def index_without_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def index_cut_short(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def index_names_a_folder(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": "."}}))


SHARD = "model-00002-of-00002.safetensors"


def remove_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def cut_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 3)


def cut_header(folder: Path) -> None:
    os.truncate(folder / SHARD, 20)


def empty_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, 0)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_index, "neither model.safetensors nor model.safetensors.index.json"),
        (index_without_map, f"{INDEX} has no weight_map"),
        (index_cut_short, f"{INDEX} cannot be read as JSON"),
        (index_names_a_folder, "model is damaged"),
        (remove_shard, f"{SHARD} is missing"),
        (cut_shard, f"{SHARD} is damaged or cut short"),
        (cut_header, f"{SHARD} is damaged or cut short"),
        (empty_shard, f"{SHARD} is damaged or cut short"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    folder = sharded(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        Checkpoint(folder)
    assert "\n" not in caught.value.message


def identity(folder: Path, cache: Path, **settings: object) -> str:
    return base_identity(Checkpoint(folder), settings, cache)


def test_identity_is_of_the_content_alone(tmp_path: Path) -> None:
    folders = [
        write(tmp_path / "one", TENSORS),
        write(tmp_path / "elsewhere" / "one", TENSORS),
        sharded(tmp_path / "two"),
        write(tmp_path / "three", shard("c.codes"), shard("b.bias", "b.weight"), shard("a.weight")),
    ]
    identities = {identity(folder, tmp_path / "cache") for folder in folders}
    assert len(identities) == 1
    assert all(len(digest) == 64 for digest in identities)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def changed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return TENSORS | {name: tensor}


@pytest.mark.parametrize(
    "tensors",
    [
        changed("a.weight", TENSORS["a.weight"].clone().index_fill_(1, torch.tensor(3), 0.5)),
        changed("a.weight", TENSORS["a.weight"].reshape(4, 3)),
        changed("c.codes", TENSORS["c.codes"].view(torch.int8)),
        changed("d.weight", torch.zeros(1)),
        changed("d.weight", torch.zeros(0)),
        shard("a.weight", "b.weight", "b.bias"),
        {name.replace("a.", "d."): tensor for name, tensor in TENSORS.items()},
    ],
    ids=["byte", "shape", "dtype", "tensor more", "empty tensor more", "tensor less", "name"],
)
def test_identity_changes_with_any(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    before = write(tmp_path / "before", TENSORS)
    after = write(tmp_path / "after", tensors)
    assert identity(before, tmp_path / "cache") != identity(after, tmp_path / "cache")


def test_identity_changes_with_the_settings(folder: Path, tmp_path: Path) -> None:
    settings = [{}, {"blocksize": 64}, {"blocksize": 128}]
    assert len({identity(folder, tmp_path / "cache", **s) for s in settings}) == 3


def flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_identity_is_cached_by_path_size_and_time_of_change(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "model", TENSORS)
    path = folder / "model.safetensors"
    before = identity(folder, cache)
    stat = path.stat()
    flip_last_byte(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(folder, cache) == before, "the file was read again"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity(folder, cache) != before
    shutil.rmtree(cache)
    flip_last_byte(path)
    assert identity(folder, cache) == before


@pytest.mark.parametrize("text", ["", "abc"])
def test_a_damaged_cache_entry_is_made_anew(tmp_path: Path, text: str) -> None:
    cache = tmp_path / "cache"
    folder = write(tmp_path / "model", TENSORS)
    before = identity(folder, cache)
    [entry] = cache.iterdir()
    entry.write_text(text)
    assert identity(folder, cache) == before
    assert len(entry.read_text()) == 64
