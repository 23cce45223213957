"""The adapter store over damage: changed bytes, lost files, manifests that make no sense."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from errno import EROFS
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from loraplex.adapters.store import AdapterState, AdapterStore
from loraplex.errors import RequestError, StartupError

from tests.server.adapters.store_cases import (
    SPEC,
    WEIGHTS,
    QuickDisk,
    blob_of,
    open_store,
    publish,
    refused,
    request_for,
    states,
    suspended,
    uploaded,
    version_of,
    versions_on_disk,
)

OLD, NEW = b"old weights", b"new weights"


def test_bytes_that_changed_on_disk_are_quarantined(tmp_path: Path) -> None:
    store = open_store(tmp_path)
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
    assert states(again) == dict.fromkeys(["alice", "bob"], AdapterState.QUARANTINED)
    error = refused("ADAPTER_UNUSABLE", again.acquire, "alice")
    assert error.message.startswith("alice is quarantined: ")
    assert error.message.endswith("; the same upload again repairs it")
    refused("ADAPTER_UNUSABLE", again.set_pinned, "alice", True)
    again.close()
    path.write_bytes(b"weights")
    last = open_store(tmp_path)
    assert last.get("bob").state is AdapterState.QUARANTINED
    upload, sha256 = uploaded(last, "bob", b"weights")
    beside, _ = uploaded(last, "alice", b"weights")
    published = last.publish(upload, version, SPEC, sha256)
    assert (published.record.state, *published[1:]) == (AdapterState.READY, False, True)
    assert last.get("alice").state is AdapterState.READY
    assert last.publish(beside, version, SPEC, sha256)[1:] == (False, False)
    last.verify(version)
    last.close()


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
@pytest.mark.parametrize("harm", ["missing", "shorter", "changed"])
@pytest.mark.parametrize("how", ["verify", "scrub"])
def test_every_harm_to_what_was_uploaded_is_found(
    tmp_path: Path, name: str, harm: str, how: str
) -> None:
    store = open_store(tmp_path)
    version = publish(store, "alice").version
    other = publish(store, "bob", NEW).version
    store.close()
    store = open_store(tmp_path)
    path = store.blob(version) / name
    data, noted = path.read_bytes(), list[int]()
    if how == "scrub":
        store.verify(version)  # which would not look again
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + (b"" if harm == "shorter" else b"!"))
    look = store.verify if how == "verify" else partial(store.scrub, on_bytes=noted.append)
    refused("ADAPTER_UNUSABLE", look, version)
    look(other)
    assert (sum(noted) >= len(NEW)) == (how == "scrub")
    assert states(store) == {"alice": AdapterState.QUARANTINED, "bob": AdapterState.READY}
    store.delete("alice")
    assert versions_on_disk(tmp_path) == {other}
    store.close()


def test_who_runs_on_bytes_that_turn_out_damaged_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    version = store.acquire(publish(store, "alice").adapter_id).version
    (store.blob(version) / WEIGHTS).write_bytes(b"weighty")
    refused("ADAPTER_UNUSABLE", store.scrub, version, print)
    assert store.references(version) == 1
    assert publish(store, "alice").state is AdapterState.READY  # repaired, under its reader
    store.verify(version)
    store.scrub(version, print)
    store.release(version)
    store.close()


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_bytes_that_came_are_not_given_for_others_that_nobody_looked_at(
    tmp_path: Path, name: str
) -> None:
    store = open_store(tmp_path)
    version = publish(store, "alice").version
    store.close()
    (store.blob(version) / WEIGHTS).write_bytes(b"WEIGHTS")
    store = open_store(tmp_path)
    assert publish(store, name).state is AdapterState.READY
    assert (store.blob(version) / WEIGHTS).read_bytes() == b"weights"
    store.scrub(version, print)
    assert set(states(store).values()) == {AdapterState.READY}
    store.close()


def damaged(root: Path, harm: Callable[[Path], Any]) -> AdapterStore:
    store = open_store(root)
    publish(store, "alice", OLD)
    publish(store, "bob", NEW)
    store.close()
    harm(root)
    return open_store(root)


HARMS: dict[str, Callable[[Path], Any]] = {
    "no blob": lambda root: shutil.rmtree(blob_of(root, OLD)),
    "no weights": lambda root: (blob_of(root, OLD) / WEIGHTS).unlink(),
    "no config": lambda root: (blob_of(root, OLD) / "adapter_config.json").unlink(),
    "short weights": lambda root: (blob_of(root, OLD) / WEIGHTS).write_bytes(OLD[:-1]),
    "no record": lambda root: (blob_of(root, OLD) / "record.json").unlink(),
    "half a record": lambda root: (blob_of(root, OLD) / "record.json").write_text(
        '{"format": 1, "fi'
    ),
    "an odd record": lambda root: (blob_of(root, OLD) / "record.json").write_text(
        json.dumps({"format": 1, "files": {"../../x": {"size": 1, "sha256": "0"}}})
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_blob_that_is_not_whole_is_quarantined(tmp_path: Path, harm: str) -> None:
    store = damaged(tmp_path, HARMS[harm])
    assert store.get("alice").state is AdapterState.QUARANTINED
    assert store.get("bob").state is AdapterState.READY
    with pytest.raises(RequestError, match="quarantined"):
        store.verify(store.get("alice").version)
    publish(store, "alice", OLD)
    assert store.get("alice").state is AdapterState.READY
    store.verify(store.get("alice").version)
    store.close()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "[" * 100_000, '{"format": 1}', "null", "\x00"],
)
def test_a_manifest_that_cannot_be_read_is_seen_and_can_be_deleted(
    tmp_path: Path, text: str
) -> None:
    manifest = tmp_path / "manifests" / "default" / "alice.json"
    store = damaged(tmp_path, lambda root: manifest.write_text(text))
    record = store.get("alice")
    assert (record.state, record.version) == (AdapterState.QUARANTINED, "")
    assert store.list(0, "")[0][0] == record
    assert (blob_of(tmp_path, OLD) / WEIGHTS).exists()
    assert store.get("bob").state is AdapterState.READY
    refused("ADAPTER_EXISTS", publish, store, "alice", OLD)
    refused("ADAPTER_UNUSABLE", store.acquire, "alice")
    store.delete("alice")
    publish(store, "alice", OLD)
    store.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("adapter_id", "bob"),
        ("version", "../../../x"),
        ("size_bytes", "many"),
        ("target_modules", None),
        ("visibility", "none"),
    ],
)
def test_a_manifest_of_another_kind_is_not_half_understood(
    tmp_path: Path, key: str, value: object
) -> None:
    manifest = tmp_path / "manifests" / "default" / "alice.json"

    def harm(root: Path) -> None:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {key: value}))

    store = damaged(tmp_path, harm)
    assert store.get("alice").version == ""
    store.close()


def test_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    upload_id = request_for("carol", OLD).upload_id

    def leave(root: Path) -> None:
        uploads = root / "uploads" / "default"
        shutil.rmtree(uploads)
        shutil.copytree(blob_of(root, OLD), uploads / "0123" / "blob")
        (uploads / "0123" / WEIGHTS).write_bytes(b"half")
        (uploads / "4567").write_text('{"format": 1}')
        (uploads / upload_id).mkdir()
        (uploads / upload_id / "upload.json").write_text('{"format": 1}')
        (uploads / upload_id / WEIGHTS).write_bytes(b"half")
        (root / "tmp" / "89ab").write_text("{")
        shutil.copytree(blob_of(root, OLD), root / "tmp" / "cdef")
        orphan = root / "blobs" / "sha256" / "00" / ("00" * 32)
        shutil.copytree(blob_of(root, OLD), orphan)

    store = damaged(tmp_path, leave)
    for folder in ("uploads/default", "tmp"):
        assert list((tmp_path / folder).iterdir()) == []
    assert versions_on_disk(tmp_path) == {version_of(OLD), version_of(NEW)}
    publish(store, "carol", OLD)
    store.close()


def test_files_that_are_not_the_stores_are_left_alone(tmp_path: Path) -> None:
    manifest = tmp_path / "manifests" / "default" / "Not An Id.json"
    store = damaged(tmp_path, lambda root: manifest.write_text("mine"))
    assert [record.adapter_id for record in store.list(0, "")[0]] == ["alice", "bob"]
    store.close()
    assert manifest.read_text() == "mine"


def test_a_manifest_that_cannot_be_read_can_be_replaced(tmp_path: Path) -> None:
    manifest = tmp_path / "manifests" / "default" / "alice.json"
    store = damaged(tmp_path, lambda root: manifest.write_text("{"))
    publish(store, "alice", OLD, replace=True)
    assert states(store) == dict.fromkeys(["alice", "bob"], AdapterState.READY)
    store.close()


class ReadOnlyDisk(QuickDisk):
    """Answers as a file system that is mounted read-only."""

    def make(self, path: Path) -> None:
        if not path.exists():
            self._refuse()

    def open(self, path: Path, size: int) -> int:
        return self._refuse()

    def rename(self, source: Path, target: Path) -> None:
        self._refuse()

    def remove(self, path: Path) -> None:
        self._refuse()

    def remove_folder(self, path: Path) -> None:
        pass

    def _refuse(self) -> NoReturn:
        raise OSError(EROFS, "read-only")


def test_a_read_only_store_serves_what_it_has(tmp_path: Path) -> None:
    writable = open_store(tmp_path)
    record = publish(writable, "alice")
    half = suspended(writable, "bob", b"abcdef", 3)
    writable.close()
    (tmp_path / "tmp" / "left").write_text("{")
    store = open_store(tmp_path, disk=ReadOnlyDisk())
    with pytest.raises(StartupError, match="in use"):
        open_store(tmp_path, disk=ReadOnlyDisk())
    assert store.acquire("alice").version == record.version
    store.verify(record.version)
    store.scrub(record.version, print)
    for call in (
        partial(store.begin, request_for("carol", b"x")),
        partial(store.begin, replace(half, resume_offset=3)),
        partial(store.set_pinned, "alice", True),
        partial(store.delete, "alice"),
        partial(store.add_file, record.version, "packed", tmp_path / "tmp" / "left"),
        store.sweep,
    ):
        refused("STORE_UNAVAILABLE", call)
    assert store.get("alice").state is AdapterState.READY
    assert not store.get("alice").pinned
    store.release(record.version)
    store.close()
    again = open_store(tmp_path)
    assert again.upload_status(half.upload_id).committed_size == 3
    again.close()


def test_a_read_only_disk_without_a_store_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with pytest.raises(StartupError, match="read-only"):
        open_store(tmp_path, disk=ReadOnlyDisk())
