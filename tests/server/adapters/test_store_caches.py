"""Caches beside what was uploaded: kept while they are sound, and never in the way of anything."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraplex.adapters.store import AdapterState, AdapterStore

from tests.server.adapters.store_cases import (
    SPEC,
    WEIGHTS,
    QuickDisk,
    open_store,
    publish,
    refused,
    uploaded,
    version_of,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


class FullDisk(QuickDisk):
    """Once it is full nothing more is written, but what is there can be removed."""

    is_full = False

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.check()
        return super().pwrite(fd, data, offset)

    def check(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no")


class StuckDisk(FullDisk):
    """Nor removed."""

    def remove(self, path: Path) -> None:
        self.check()
        super().remove(path)


def publish_with_cache(store: AdapterStore, root: Path) -> Path:
    version = publish(store, "alice").version
    (root / "packed").write_bytes(b"cache")
    store.add_file(version, "packed", root / "packed")
    return store.blob(version) / "packed"


def test_caches_come_and_go_beside_what_was_uploaded(tmp_path: Path, store: AdapterStore) -> None:
    version = version_of(b"weights")

    def publish_with(name: str, cache: str) -> None:
        upload, sha256 = uploaded(store, name, b"weights")
        (upload.folder / cache).write_bytes(cache.encode())
        store.publish(upload, version, SPEC, sha256, {cache: upload.folder / cache})

    publish_with("alice", "packed-1")
    (tmp_path / "packed-2").write_bytes(b"two")
    store.add_file(version, "packed-2", tmp_path / "packed-2")
    publish_with("bob", "packed-3")
    folder = store.blob(version)
    assert store.cache(version, "packed-2") == folder / "packed-2"
    assert store.cache(version, "packed-4") is None
    caches = {"packed-1", "packed-2", "packed-3"}
    assert {path.name for path in folder.glob("packed*")} == caches
    store.close()
    (folder / "packed-1").write_bytes(b"PACKED-1")
    (folder / "packed-2").write_bytes(b"")
    again = open_store(tmp_path)
    again.verify(version)
    assert {path.name for path in folder.glob("packed*")} == {"packed-2", "packed-3"}
    record = json.loads((folder / "record.json").read_text())
    assert record["files"].keys() == {WEIGHTS, "adapter_config.json", "packed-3"}
    assert again.get("alice").state is AdapterState.READY
    again.close()


def test_a_scrub_drops_caches_and_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    class WornDisk(QuickDisk):
        is_worn = False

        def forget(self, path: Path) -> None:
            super().forget(path)
            if self.is_worn:
                raise OSError(errno.EIO, "no")

    disk = WornDisk()
    store = open_store(tmp_path, disk=disk)
    version = publish(store, "alice").version
    cache = store.blob(version) / "packed"
    (tmp_path / "packed").write_bytes(b"cache")
    store.add_file(version, "packed", tmp_path / "packed")
    cache.write_bytes(b"CACHE")
    store.scrub(version, print)
    assert not cache.exists()
    assert store.cache(version, "packed") is None
    disk.is_worn = True
    refused("STORE_UNAVAILABLE", store.scrub, version, print)
    assert store.get("alice").state is AdapterState.READY
    store.close()


@pytest.mark.parametrize("kind", [FullDisk, StuckDisk])
def test_a_damaged_cache_on_a_disk_that_refuses_is_no_more_than_unused(
    tmp_path: Path, kind: type[FullDisk]
) -> None:
    disk = kind()
    store = open_store(tmp_path, disk=disk)
    cache = publish_with_cache(store, tmp_path)
    store.close()
    cache.write_bytes(b"CACHE")
    version = version_of(b"weights")
    for _ in range(2):  # a restart does not believe in what it could not remove
        store = open_store(tmp_path, disk=disk)
        disk.is_full = True
        store.verify(version)
        assert store.cache(version, "packed") is None
        assert store.get("alice").state is AdapterState.READY
        disk.is_full = False
        store.close()


def test_a_cache_that_cannot_be_read_is_dropped(tmp_path: Path, store: AdapterStore) -> None:
    cache = publish_with_cache(store, tmp_path)
    cache.unlink()
    cache.symlink_to("/proc/self/mem")  # an I/O error where there is such a thing
    store.scrub(version_of(b"weights"), print)
    assert not cache.is_symlink()
    assert store.get("alice").state is AdapterState.READY


def test_a_cache_that_was_not_written_down_is_not_used(tmp_path: Path) -> None:
    """A crash between its rename and the record leaves a file that nobody looks after."""
    disk = FullDisk()
    store = open_store(tmp_path, disk=disk)
    version = publish(store, "alice").version
    (tmp_path / "packed").write_bytes(b"cache")
    disk.is_full = True
    refused("DISK_FULL", store.add_file, version, "packed", tmp_path / "packed")
    disk.is_full = False
    assert (store.blob(version) / "packed").exists()
    for _ in range(2):
        store.verify(version)
        assert store.cache(version, "packed") is None
        store.close()
        store = open_store(tmp_path)
    store.close()


def test_a_cache_that_the_disk_refuses_costs_no_upload(tmp_path: Path) -> None:
    class FailingDisk(QuickDisk):
        def sync(self, path: Path) -> None:
            if path.name == "packed":  # as of a disk that finds out late that it is full
                raise OSError(errno.ENOSPC, "no")

    store = open_store(tmp_path, disk=FailingDisk())
    upload, sha256 = uploaded(store, "alice", b"abcdef")
    cache = upload.folder / "packed"
    cache.write_bytes(b"packed")
    record, created, _ = store.publish(upload, sha256, SPEC, sha256, {"packed": cache})
    assert (created, store.cache(sha256, "packed")) == (True, None)
    store.verify(record.version)
    assert not cache.exists()
    store.close()
