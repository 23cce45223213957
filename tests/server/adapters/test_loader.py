"""The loader gives the packed adapter in whatever state its cache file is, on its own threads."""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.packing import Layout, PackedAdapter
from loraplex.adapters.peft import BaseLinear, read_adapter, read_config
from loraplex.errors import RequestError
from safetensors.torch import load_file, save_file
from torch import Tensor

DIGEST = "d" * 64
LAYOUT = Layout(8192, torch.bfloat16)
LINEAR = BaseLinear("model.layers.0.self_attn.q_proj", 0, "q_proj", 64, 64)
LINEARS = {LINEAR.name: LINEAR}
RANK = 24
CONFIG = json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8})


class FolderBlobs:
    """One blob in a folder; `refuse` and `full` are errors of verify and add_file.

    `distrusts`: its caches are not to be used.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "blob"
        self.temporary = root / "tmp"
        self.refuse: RequestError | None = None
        self.full: RequestError | None = None
        self.distrusts = False
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

    def cache(self, version: str, name: str) -> Path | None:
        path = self.folder / name
        return path if path.exists() and not self.distrusts else None

    def add_file(self, version: str, name: str, source: Path) -> None:
        if self.full:
            raise self.full
        source.rename(self.folder / name)


def no_base(name: str) -> Tensor:
    raise AssertionError("a plain adapter needs no base weights")


def loader_of(blobs: FolderBlobs, layout: Layout = LAYOUT, max_rank: int = 64) -> AdapterLoader:
    return AdapterLoader(blobs, LINEARS, layout, max_rank, no_base)


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path)


@pytest.fixture
def loader(blobs: FolderBlobs) -> Iterator[AdapterLoader]:
    made = loader_of(blobs)
    yield made
    made.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loraplex-loader")]
    assert list(blobs.temporary.iterdir()) == []


def read(loader: AdapterLoader) -> PackedAdapter:
    return loader.read(DIGEST).result(timeout=10)


def same(one: PackedAdapter, other: PackedAdapter) -> bool:
    return one.contents == other.contents and torch.equal(one.data, other.data)


def test_packed_once_then_mapped(loader: AdapterLoader, blobs: FolderBlobs) -> None:
    first = read(loader)
    assert len(first.contents.granules) == 2
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


def test_a_cache_file_that_the_store_does_not_vouch_for_is_not_used(
    loader: AdapterLoader, blobs: FolderBlobs
) -> None:
    first = read(loader)
    (path,) = blobs.cache_files
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # which looks as good as the other
    blobs.distrusts = True
    assert same(read(loader), first)


def test_a_cache_file_that_cannot_be_written_is_no_reason_to_refuse_an_upload(
    loader: AdapterLoader, blobs: FolderBlobs, caplog: pytest.LogCaptureFixture
) -> None:
    spec = read_adapter(blobs.weights, read_config(CONFIG, 64), LINEARS, 64)
    (name,) = loader.pack_upload(blobs.weights, spec)
    blobs.weights.with_name(name).unlink()
    blobs.weights.with_name(name).symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        assert loader.pack_upload(blobs.weights, spec) == {}
    assert "not kept packed" in caplog.text
    assert blobs.cache_files == []


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
    other = loader_of(blobs, Layout(16384, torch.float32))
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
    smaller = loader_of(blobs, max_rank=16)
    with pytest.raises(RequestError) as error:
        read(smaller)
    assert error.value.reason.name == "ADAPTER_UNUSABLE"
    assert error.value.message == "rank 24 is over this server's 16 (--max-rank)"
    smaller.close()


def test_what_this_server_would_not_take_is_unusable_rather_than_a_bad_request(
    loader: AdapterLoader, blobs: FolderBlobs
) -> None:
    (blobs.folder / "adapter_config.json").write_text(CONFIG.replace("LORA", "IA3"))
    with pytest.raises(RequestError, match="peft_type") as error:
        read(loader)
    assert (error.value.reason.name, error.value.field) == ("ADAPTER_UNUSABLE", None)

    (blobs.folder / "adapter_config.json").write_text(CONFIG)
    tensors = {name: 1e6 * tensor for name, tensor in load_file(blobs.weights).items()}
    save_file(tensors, blobs.weights)
    half = loader_of(blobs, Layout(8192, torch.float16))  # another device's type
    with pytest.raises(RequestError, match="lora_A") as error:
        read(half)
    assert error.value.reason.name == "ADAPTER_UNUSABLE"
    half.close()


def test_what_was_read_is_brought_to_where_it_is_kept(blobs: FolderBlobs) -> None:
    kept: list[PackedAdapter] = []

    def hold(packed: PackedAdapter) -> PackedAdapter:
        kept.append(packed)
        return replace(packed, data=packed.data.clone())

    loader = AdapterLoader(blobs, LINEARS, LAYOUT, 64, no_base, hold)
    packed = read(loader)
    loader.close()
    assert same(packed, kept[0])
    assert packed.data.data_ptr() != kept[0].data.data_ptr()


def test_work_runs_on_threads_that_give_way(loader: AdapterLoader) -> None:
    seen: list[tuple[str, int, int]] = []

    def look() -> None:
        thread = threading.current_thread()
        niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        seen.append((thread.name, torch.get_num_threads(), niceness))

    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    loader.run(look).result(timeout=10)
    ((name, num_threads, worker_niceness),) = seen
    assert name.startswith("loraplex-loader")
    assert num_threads == 1
    assert worker_niceness > niceness or sys.platform != "linux"
    with pytest.raises(ZeroDivisionError):
        loader.run(lambda: seen.append(("", 1 // 0, 0))).result(timeout=10)
