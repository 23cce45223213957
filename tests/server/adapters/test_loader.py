"""The loader gives the packed adapter in whatever state its cache file is, on its own threads."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.packing import Layout, PackedAdapter
from loraplex.adapters.peft import BaseLinear, read_adapter, read_config
from loraplex.errors import RequestError
from safetensors.torch import save_file

DIGEST = "d" * 64
LAYOUT = Layout(8192, torch.bfloat16)
LINEAR = BaseLinear("model.layers.0.self_attn.q_proj", 0, "q_proj", 64, 64)
LINEARS = {LINEAR.name: LINEAR}
RANK = 24
CONFIG = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8})


class FolderBlobs:
    """One blob in a folder; `refuse` and `full` are errors of verify and add_file."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "blob"
        self.temporary = root / "tmp"
        self.refuse: RequestError | None = None
        self.full: RequestError | None = None
        for folder in (self.folder, self.temporary):
            folder.mkdir()
        a, b = torch.randn(RANK, 64), torch.randn(64, RANK)
        prefix = f"base_model.model.{LINEAR.name}"
        tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(tensors, self.weights)
        (self.folder / "adapter_config.json").write_text(CONFIG)

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    @property
    def cache_files(self) -> list[Path]:
        return list(self.folder.glob("packed-*"))

    def verify(self, version: str) -> None:
        assert version == DIGEST
        if self.refuse:
            raise self.refuse

    def blob(self, version: str) -> Path:
        return self.folder

    def add_file(self, version: str, name: str, source: Path) -> None:
        if self.full:
            raise self.full
        source.rename(self.folder / name)


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path)


@pytest.fixture
def loader(blobs: FolderBlobs) -> Iterator[AdapterLoader]:
    made = AdapterLoader(blobs, LINEARS, LAYOUT, max_rank=64)
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loraplex-loader")]
    assert list(blobs.temporary.iterdir()) == []


def read(loader: AdapterLoader) -> PackedAdapter:
    return loader.read(DIGEST).result(timeout=10)


def same(one: PackedAdapter, other: PackedAdapter) -> bool:
    return one.granules == other.granules and torch.equal(one.data, other.data)


def test_packed_once_then_mapped(loader: AdapterLoader, blobs: FolderBlobs) -> None:
    first = read(loader)
    assert len(first.granules) == 2
    assert len(blobs.cache_files) == 1
    blobs.weights.unlink()  # it is not looked at again
    assert same(read(loader), first)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_a_damaged_cache_file_is_written_anew(
    loader: AdapterLoader, blobs: FolderBlobs, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    first = read(loader)
    (path,) = blobs.cache_files
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with caplog.at_level(logging.WARNING):
        assert same(read(loader), first)
    assert "again" in caplog.text
    assert path.read_bytes() == whole


def test_what_was_packed_at_upload_is_what_is_read(
    loader: AdapterLoader, blobs: FolderBlobs, tmp_path: Path
) -> None:
    config = read_config(CONFIG, 64)
    spec = read_adapter(blobs.weights, config, LINEARS, 64)
    ((name, path),) = loader.pack_upload(blobs.weights, spec).items()
    assert path.name == name
    packed_at_upload = path.read_bytes()
    fresh = read(loader)
    path.unlink()
    assert same(read(loader), fresh)
    assert path.read_bytes() == packed_at_upload


def test_another_layout_packs_its_own(loader: AdapterLoader, blobs: FolderBlobs) -> None:
    read(loader)
    other = AdapterLoader(blobs, LINEARS, Layout(16384, torch.float32), max_rank=64)
    assert read(other).data.shape[1] == 16384
    other.close()
    assert len(blobs.cache_files) == 2


def test_no_room_for_the_cache_file_is_no_reason_to_fail(
    loader: AdapterLoader, blobs: FolderBlobs, caplog: pytest.LogCaptureFixture
) -> None:
    blobs.full = RequestError("DISK_FULL", "no room")
    with caplog.at_level(logging.WARNING):
        assert read(loader).num_blocks == 1
    assert blobs.cache_files == []
    assert "no room" in caplog.text


def test_a_damaged_adapter_is_refused(loader: AdapterLoader, blobs: FolderBlobs) -> None:
    blobs.refuse = RequestError("ADAPTER_UNUSABLE", "its bytes changed")
    with pytest.raises(RequestError, match="bytes changed"):
        read(loader)


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_rank_over_a_smaller_limit_is_refused(
    loader: AdapterLoader, blobs: FolderBlobs, is_cached: bool
) -> None:
    """The server came back with a smaller --max-rank; its tables have no room for this adapter."""
    if is_cached:
        read(loader)
    smaller = AdapterLoader(blobs, LINEARS, LAYOUT, max_rank=16)
    with pytest.raises(RequestError) as error:
        read(smaller)
    assert error.value.reason.name == "ADAPTER_INVALID"
    smaller.close()


def test_work_runs_on_the_loaders_threads(loader: AdapterLoader) -> None:
    names: list[str] = []
    loader.run(lambda: names.append(threading.current_thread().name)).result(timeout=10)
    assert names[0].startswith("loraplex-loader")
    with pytest.raises(ZeroDivisionError):
        loader.run(lambda: names.append(str(1 / 0))).result(timeout=10)
