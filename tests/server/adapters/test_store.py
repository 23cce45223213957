"""The adapter store: names, versions, uploads, references, and what a restart finds."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loraplex.adapters.peft import AdapterSpec
from loraplex.adapters.store import (
    AdapterRecord,
    AdapterState,
    AdapterStore,
    Upload,
    Visibility,
    validate_adapter_id,
)
from loraplex.adapters.store_files import Disk
from loraplex.errors import InvalidRequestError, RequestError, StartupError

BASE = "b" * 64
CONFIG = '{"peft_type": "LORA", "r": 8,\n "lora_alpha": 16}'
SPEC = AdapterSpec(
    modules=(),
    rank=8,
    target_modules=("q_proj", "v_proj"),
    warnings=(),
    config_json="{}",
    uploaded_config_json=CONFIG,
)
MAX_BYTES = 1 << 20
NOW = 1_700_000_000.25
WEIGHTS = "adapter_model.safetensors"


def open_store(root: Path, **options: Any) -> AdapterStore:
    return AdapterStore.open(root, BASE, MAX_BYTES, **{"clock": lambda: NOW} | options)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def version_of(content: bytes) -> str:
    return hashlib.sha256(b"version" + content).hexdigest()


def uploaded(store: AdapterStore, name: str, content: bytes) -> tuple[Upload, str]:
    upload = store.begin(name, len(content))
    half = len(content) // 2
    upload.write(0, content[:half])
    upload.write(half, content[half:])
    return upload, upload.finish()


def publish(store: AdapterStore, name: str, content: bytes = b"weights") -> AdapterRecord:
    upload, sha256 = uploaded(store, name, content)
    try:
        return store.publish(upload, name, version_of(content), SPEC, sha256, "private")[0]
    finally:
        upload.discard()


def refused(reason: str, call: Callable[..., Any], *args: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert caught.value.reason.name == reason
    return caught.value


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def blob_files(root: Path) -> set[str]:
    return files_below(root / "blobs")


def test_a_published_adapter_survives_a_restart(tmp_path: Path, store: AdapterStore) -> None:
    upload, sha256 = uploaded(store, "alice", b"weights")
    assert sha256 == hashlib.sha256(b"weights").hexdigest()
    version = version_of(b"weights")
    record, created = store.publish(upload, "alice", version, SPEC, sha256, "shared")
    assert created
    assert record == AdapterRecord(
        adapter_id="alice",
        version=version,
        etag=record.etag,
        size_bytes=7,
        rank=8,
        target_modules=("q_proj", "v_proj"),
        state=AdapterState.READY,
        visibility=Visibility.SHARED,
        create_time=NOW,
        last_used_time=None,
        owner="default",
        base_id=BASE,
    )
    folder = store.blob(version)
    assert folder == tmp_path / "blobs" / "sha256" / version[:2] / version
    assert (folder / WEIGHTS).read_bytes() == b"weights"
    assert (folder / "adapter_config.json").read_text() == CONFIG
    assert files_below(tmp_path / "uploads") == set()
    store.close()
    again = open_store(tmp_path)
    assert again.get("alice") == record
    assert again.blob(version) == folder
    again.verify(version)
    again.close()


def test_a_store_has_one_server(tmp_path: Path, store: AdapterStore) -> None:
    with pytest.raises(StartupError, match="in use by another server") as caught:
        open_store(tmp_path)
    assert str(tmp_path) in caught.value.message
    store.close()
    store.close()
    open_store(tmp_path).close()


def test_a_store_that_cannot_be_a_folder_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="file"):
        open_store(tmp_path / "file")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "manifests").write_text("")
    for _ in range(2):
        with pytest.raises(StartupError, match="root"):
            open_store(tmp_path / "root")


@pytest.mark.parametrize("name", ["a", "0", "a-b_c.d", "a" * 63])
def test_adapter_ids_that_are_allowed(name: str) -> None:
    validate_adapter_id(name)


@pytest.mark.parametrize(
    "name",
    ["", "A", "a" * 64, "-a", "a-", ".a", "a.", "a..b", "a/b", "../a", "a b", "a\n", "é", "a\0b"],
)
def test_adapter_ids_that_are_not(name: str, store: AdapterStore) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_adapter_id(name)
    assert caught.value.field == "adapter_id"
    assert refused("INVALID_FIELD", store.begin, name, 1).field == "header.adapter_id"


def test_the_same_content_again_is_the_same_adapter(store: AdapterStore) -> None:
    first = publish(store, "alice")
    upload, sha256 = uploaded(store, "alice", b"weights")
    again = store.publish(upload, "alice", first.version, SPEC, sha256, "private")
    assert again == (first, False)
    publish(store, "alice")


def test_other_content_under_the_same_name_is_refused(tmp_path: Path, store: AdapterStore) -> None:
    first = publish(store, "alice")
    before = files_below(tmp_path)
    upload, sha256 = uploaded(store, "alice", b"other")
    version = version_of(b"other")
    refused("ADAPTER_EXISTS", store.publish, upload, "alice", version, SPEC, sha256, "private")
    upload.discard()
    assert store.get("alice") == first
    assert files_below(tmp_path) == before
    store.delete("alice")
    assert publish(store, "alice", b"other").etag != first.etag


def test_two_names_share_one_blob_until_the_last_goes(tmp_path: Path, store: AdapterStore) -> None:
    first, second = publish(store, "alice"), publish(store, "bob")
    assert first.version == second.version
    assert first.etag != second.etag
    assert len(blob_files(tmp_path)) == 3
    store.delete("alice")
    refused("ADAPTER_NOT_FOUND", store.get, "alice")
    assert (store.blob(second.version) / WEIGHTS).exists()
    store.delete("bob")
    assert blob_files(tmp_path) == set()
    refused("ADAPTER_NOT_FOUND", store.blob, second.version)
    refused("ADAPTER_NOT_FOUND", store.retain, second.version)
    refused("ADAPTER_NOT_FOUND", store.verify, second.version)
    refused("ADAPTER_NOT_FOUND", store.delete, "bob")


def test_a_reader_keeps_a_deleted_adapters_files(tmp_path: Path, store: AdapterStore) -> None:
    version = publish(store, "alice").version
    store.retain(version)
    store.retain(version)
    store.delete("alice")
    refused("ADAPTER_NOT_FOUND", store.get, "alice")
    store.release(version)
    store.verify(version)
    assert (store.blob(version) / WEIGHTS).read_bytes() == b"weights"
    store.release(version)
    assert blob_files(tmp_path) == set()


def test_a_deleted_adapter_may_come_back_while_it_is_read(store: AdapterStore) -> None:
    version = publish(store, "alice").version
    store.retain(version)
    store.delete("alice")
    publish(store, "bob")
    store.release(version)
    assert (store.blob(version) / WEIGHTS).exists()


def test_pages_go_by_name(store: AdapterStore) -> None:
    names = ["b", "a", "a.b", "a-b", "c0", "c"]
    for name in names:
        publish(store, name)
    seen, token = [], ""
    while True:
        records, token = store.list(2, token)
        assert len(records) == 2
        seen += [record.adapter_id for record in records]
        if not token:
            break
    assert seen == sorted(names)
    _, token = store.list(1, "")
    store.delete("a")
    records, token = store.list(0, token)
    assert [record.adapter_id for record in records] == sorted(names)[1:]
    assert token == ""


def test_page_sizes(tmp_path: Path, store: AdapterStore) -> None:
    publish(store, "n0")
    store.close()
    manifests = tmp_path / "manifests" / "default"
    text = (manifests / "n0.json").read_text()
    for number in range(1, 1_002):
        (manifests / f"n{number}.json").write_text(text.replace('"n0"', f'"n{number}"'))
    again = open_store(tmp_path)
    assert [len(again.list(size, "")[0]) for size in (0, 3, 1_000, 5_000)] == [50, 3, 1_000, 1_000]
    assert refused("INVALID_FIELD", again.list, -1, "").field == "page_size"
    again.close()


@pytest.mark.parametrize("token", ["x", "YQ", "YQ==\n", "L2V0Yw==", "é", "=", "YQ==YQ=="])
def test_a_token_that_was_never_given_is_refused(store: AdapterStore, token: str) -> None:
    assert refused("INVALID_FIELD", store.list, 0, token).field == "page_token"


def test_an_upload_takes_its_bytes_in_order(store: AdapterStore) -> None:
    upload = store.begin("alice", 6)
    upload.write(0, b"abc")
    error = refused("OFFSET_MISMATCH", upload.write, 2, b"c")
    assert error.metadata == {"committed_size": "3"}
    refused("OFFSET_MISMATCH", upload.write, 4, b"e")
    assert refused("INVALID_FIELD", upload.write, 3, b"defg").field == "chunk.data"
    assert "6 bytes were declared, but 3 came" in refused("INVALID_FIELD", upload.finish).message
    upload.write(3, b"")
    upload.write(3, b"def")
    assert upload.finish() == hashlib.sha256(b"abcdef").hexdigest()
    assert upload.path.read_bytes() == b"abcdef"
    assert upload.committed_size == 6


def test_an_adapter_id_has_one_upload(tmp_path: Path, store: AdapterStore) -> None:
    upload = store.begin("alice", 3)
    refused("UPLOAD_IN_PROGRESS", store.begin, "alice", 3)
    store.begin("bob", 3).discard()
    upload.discard()
    upload.discard()
    refused("UPLOAD_INCOMPLETE", upload.write, 0, b"abc")
    refused("UPLOAD_INCOMPLETE", upload.finish)
    assert files_below(tmp_path / "uploads") == set()
    again = store.begin("alice", 3)
    upload.discard()
    refused("UPLOAD_IN_PROGRESS", store.begin, "alice", 3)
    again.discard()


def test_sizes_that_cannot_be_taken_are_refused_at_once(tmp_path: Path) -> None:
    class SmallDisk(Disk):
        def free_bytes(self, path: Path) -> int:
            return 100

    store = open_store(tmp_path, disk=SmallDisk())
    assert refused("INVALID_FIELD", store.begin, "a", 0).field == "header.total_size"
    assert refused("ADAPTER_TOO_LARGE", store.begin, "a", MAX_BYTES + 1).field is not None
    refused("DISK_FULL", store.begin, "a", 101)
    store.begin("a", 100).discard()
    store.close()
    refused("STORE_UNAVAILABLE", store.begin, "a", 100)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "DISK_FULL"),
        (errno.EDQUOT, "DISK_FULL"),
        (errno.EIO, "STORE_UNAVAILABLE"),
        (errno.EROFS, "STORE_UNAVAILABLE"),
    ],
)
def test_a_failing_disk_has_a_reason_and_no_path(tmp_path: Path, code: int, reason: str) -> None:
    class FailingDisk(Disk):
        failing = False

        def append(self, fd: int, data: bytes | memoryview, offset: int) -> None:
            if self.failing:
                super().append(fd, data[:1], offset)
                raise OSError(code, os.strerror(code), str(tmp_path))
            super().append(fd, data, offset)

    disk = FailingDisk()
    store = open_store(tmp_path, disk=disk)
    upload = store.begin("alice", 6)
    upload.write(0, b"abc")
    disk.failing = True
    error = refused(reason, upload.write, 3, b"xef")
    assert str(tmp_path) not in error.message
    disk.failing = False
    upload.write(3, b"def")
    assert upload.finish() == hashlib.sha256(b"abcdef").hexdigest()
    assert upload.path.read_bytes() == b"abcdef"
    store.close()


def test_the_last_use_is_written_down_when_the_store_is_closed(tmp_path: Path) -> None:
    times = iter([1.0, 2.0, 3.0])
    store = open_store(tmp_path, clock=lambda: next(times))
    publish(store, "alice")
    publish(store, "bob", b"other")
    manifest = (tmp_path / "manifests" / "default" / "alice.json").read_bytes()
    store.touch("alice")
    store.touch("nobody")
    assert store.get("alice").last_used_time == 3.0
    assert (tmp_path / "manifests" / "default" / "alice.json").read_bytes() == manifest
    record = store.get("alice")
    store.close()
    again = open_store(tmp_path)
    assert again.get("alice") == record
    assert again.get("bob").last_used_time is None
    again.close()


def test_bytes_that_changed_on_disk_are_quarantined(tmp_path: Path, store: AdapterStore) -> None:
    version = publish(store, "alice").version
    publish(store, "bob")
    path = store.blob(version) / WEIGHTS
    store.verify(version)
    path.write_bytes(b"weighty")
    store.verify(version)  # once in a process is enough
    store.close()
    again = open_store(tmp_path)
    assert again.get("alice").state is AdapterState.READY
    refused("ADAPTER_UNUSABLE", again.verify, version)
    refused("ADAPTER_UNUSABLE", again.verify, version)
    assert [record.state for record in again.list(0, "")[0]] == [AdapterState.QUARANTINED] * 2
    again.close()
    path.write_bytes(b"weights")
    last = open_store(tmp_path)
    assert last.get("bob").state is AdapterState.QUARANTINED
    upload, sha256 = uploaded(last, "bob", b"weights")
    record, created = last.publish(upload, "bob", version, SPEC, sha256, "private")
    assert (record.state, created) == (AdapterState.READY, False)
    assert last.get("alice").state is AdapterState.READY
    last.verify(version)
    last.close()


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
@pytest.mark.parametrize("harm", ["missing", "shorter", "changed"])
def test_every_harm_to_what_was_uploaded_is_found(tmp_path: Path, name: str, harm: str) -> None:
    store = open_store(tmp_path)
    version = publish(store, "alice").version
    path = store.blob(version) / name
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (b"" if harm == "shorter" else b"!"))
    refused("ADAPTER_UNUSABLE", store.verify, version)
    assert store.get("alice").state is AdapterState.QUARANTINED
    store.delete("alice")
    assert blob_files(tmp_path) == set()
    store.close()


def test_caches_come_and_go_beside_what_was_uploaded(tmp_path: Path, store: AdapterStore) -> None:
    upload, sha256 = uploaded(store, "alice", b"weights")
    (upload.folder / "packed-1").write_bytes(b"one")
    extra = {"packed-1": upload.folder / "packed-1"}
    version = version_of(b"weights")
    store.publish(upload, "alice", version, SPEC, sha256, "private", extra)
    (tmp_path / "packed-2").write_bytes(b"two")
    store.add_file(version, "packed-2", tmp_path / "packed-2")
    upload, sha256 = uploaded(store, "bob", b"weights")
    (upload.folder / "packed-3").write_bytes(b"three")
    extra = {"packed-3": upload.folder / "packed-3"}
    store.publish(upload, "bob", version, SPEC, sha256, "private", extra)
    folder = store.blob(version)
    caches = {"packed-1", "packed-2", "packed-3"}
    assert {path.name for path in folder.glob("packed*")} == caches
    store.close()
    (folder / "packed-1").write_bytes(b"ONE")
    (folder / "packed-2").write_bytes(b"")
    again = open_store(tmp_path)
    again.verify(version)
    assert {path.name for path in folder.glob("packed*")} == {"packed-2", "packed-3"}
    record = json.loads((folder / "record.json").read_text())
    assert record["files"].keys() == {WEIGHTS, "adapter_config.json", "packed-3"}
    assert again.get("alice").state is AdapterState.READY
    again.close()


def test_another_base_makes_adapters_incompatible(tmp_path: Path, store: AdapterStore) -> None:
    record = publish(store, "alice")
    store.close()
    other = AdapterStore.open(tmp_path, "c" * 64, MAX_BYTES)
    assert other.get("alice").state is AdapterState.INCOMPATIBLE
    assert other.list(0, "")[0][0].state is AdapterState.INCOMPATIBLE
    assert (other.blob(record.version) / WEIGHTS).exists()
    other.close()
    back = open_store(tmp_path)
    assert back.get("alice") == record
    back.close()


def test_many_threads_publish_read_and_delete_at_once(tmp_path: Path, store: AdapterStore) -> None:
    def work(number: int) -> None:
        name, content = f"n{number % 4}-{number}", bytes([number % 3])
        record = publish(store, name, content)
        store.retain(record.version)
        store.verify(record.version)
        store.list(0, "")
        store.touch(name)
        store.delete(name)
        assert (store.blob(record.version) / WEIGHTS).read_bytes() == content
        store.release(record.version)

    with ThreadPoolExecutor(8) as workers:
        for done in [workers.submit(work, number) for number in range(96)]:
            done.result()
    assert store.list(0, "") == ((), "")
    assert blob_files(tmp_path) == set()
    assert files_below(tmp_path / "uploads") == set()
