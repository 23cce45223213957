"""Uploads: bytes in order, resumed, taken over, with room kept for them, and forgotten in time."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from threading import Barrier

import pytest
from loraplex.adapters.store import AdapterStore, Upload
from loraplex.adapters.store_upload import NOTE_BYTES
from loraplex.errors import RequestError

from tests.server.adapters.store_cases import (
    MAX_BYTES,
    SPEC,
    WEIGHTS,
    QuickDisk,
    files_below,
    open_store,
    publish,
    refused,
    request_for,
    suspended,
    uploaded,
    version_of,
)

ID = request_for("alice", b"abcdef").upload_id


class Clock:
    """Seconds since the epoch; a test moves them."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Restart:
    """Opens a test's store, again and again."""

    def __init__(self, root: Path, clock: Clock) -> None:
        self.root = root
        self.clock = clock
        self.store: AdapterStore | None = None

    def __call__(self) -> AdapterStore:
        if self.store is not None:
            self.store.close()
        self.store = open_store(self.root, clock=self.clock, upload_ttl=60.0)
        return self.store


@pytest.fixture
def restart(tmp_path: Path, clock: Clock) -> Iterator[Restart]:
    opened = Restart(tmp_path, clock)
    yield opened
    if opened.store is not None:
        opened.store.close()


@pytest.fixture
def store(restart: Restart) -> AdapterStore:
    return restart()


def begin(
    store: AdapterStore, name: str = "alice", content: bytes = b"abcdef", at: int = 0
) -> Upload:
    return store.begin(request_for(name, content, resume_offset=at))


def uploads_below(root: Path) -> set[str]:
    return files_below(root / "uploads" / "default")


def test_an_upload_takes_its_bytes_in_order(store: AdapterStore) -> None:
    upload = begin(store)
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
    upload = begin(store)
    refused("UPLOAD_IN_PROGRESS", begin, store, "alice", b"other")
    begin(store, "bob").discard()
    upload.discard()
    upload.discard()
    refused("UPLOAD_INCOMPLETE", upload.write, 0, b"abc")
    refused("UPLOAD_INCOMPLETE", upload.finish)
    assert uploads_below(tmp_path) == set()
    again = begin(store)
    upload.discard()
    upload.suspend()
    refused("UPLOAD_IN_PROGRESS", begin, store, "alice", b"other")
    again.write(0, b"a")
    again.suspend()
    begin(store, "alice", b"other").discard()  # one that nobody sends does not block the name


@pytest.mark.parametrize("restarted", [False, True])
def test_an_upload_goes_on_where_it_was(
    store: AdapterStore, restart: Restart, restarted: bool
) -> None:
    suspended(store, "alice", b"abcdef", 4)
    store = restart() if restarted else store
    assert store.upload_status(ID).committed_size == 4
    assert store.upload_status(ID).record is None
    error = refused("OFFSET_MISMATCH", begin, store, at=2)
    assert (error.field, error.metadata) == ("header.resume_offset", {"committed_size": "4"})
    refused("OFFSET_MISMATCH", begin, store)
    upload = begin(store, at=4)
    upload.write(4, b"e")
    upload.suspend()
    upload = begin(store, at=5)
    upload.write(5, b"f")
    sha256 = upload.finish()
    assert sha256 == version_of(b"abcdef")
    assert store.publish(upload, sha256, SPEC, sha256)[1]
    assert (store.blob(sha256) / WEIGHTS).read_bytes() == b"abcdef"


def test_only_the_same_upload_goes_on(store: AdapterStore) -> None:
    request = suspended(store, "alice", b"abcdef", 4)
    for field, name, value in (
        ("adapter_id", "adapter_id", "bob"),
        ("total_size", "total_size", 7),
        ("sha256", "sha256", "0" * 64),
        ("adapter_config_json", "config_json", "{}"),
    ):
        changes = {"upload_id": request.upload_id, "resume_offset": 4, name: value}
        name_now = str(changes.pop("adapter_id", "alice"))
        other = request_for(name_now, b"abcdef", **changes)
        assert refused("INVALID_FIELD", store.begin, other).field == f"header.{field}"
    error = refused("OFFSET_MISMATCH", begin, store, "bob", at=3)  # of an upload nobody knows
    assert error.metadata == {"committed_size": "0"}
    odd = request_for("alice", b"abcdef", upload_id="../../alice")
    assert refused("INVALID_FIELD", store.begin, odd).field == "header.upload_id"
    refused("UPLOAD_NOT_FOUND", store.upload_status, "../../alice")


def test_the_same_upload_id_takes_over(store: AdapterStore) -> None:
    old = begin(store)
    old.write(0, b"abc")
    other = request_for("alice", b"abcdef", total_size=7)
    assert refused("INVALID_FIELD", store.begin, other).field == "header.total_size"
    old.write(3, b"d")  # that was no take-over
    error = refused("OFFSET_MISMATCH", begin, store)  # but this was: what is told is final
    assert error.metadata == {"committed_size": "4"}
    for call in (lambda: old.write(4, b"e"), old.finish):
        refused("UPLOAD_TAKEN_OVER", call)
    new = begin(store, at=4)
    old.suspend()
    old.discard()
    new.write(4, b"ef")
    assert new.finish() == version_of(b"abcdef")
    refused("UPLOAD_IN_PROGRESS", begin, store, at=6)  # it is being published


def test_of_many_streams_one_goes_on(store: AdapterStore) -> None:
    content = bytes(range(64))
    barrier = Barrier(6)

    def stream(at: int = 0) -> str:
        """How it ended."""
        try:
            upload = begin(store, "alice", content, at)
            for offset in range(at, 64):
                upload.write(offset, content[offset : offset + 1])
            sha256 = upload.finish()
            return f"created {store.publish(upload, sha256, SPEC, sha256)[1]}"
        except RequestError as error:
            if error.reason.name == "OFFSET_MISMATCH":
                return stream(int(error.metadata["committed_size"]))
            return error.reason.name

    def start() -> str:
        barrier.wait()
        return stream()

    with ThreadPoolExecutor(6) as workers:
        ends = [done.result() for done in [workers.submit(start) for _ in range(6)]]
    known = {"created True", "created False", "UPLOAD_TAKEN_OVER", "UPLOAD_IN_PROGRESS"}
    assert set(ends) <= known
    assert ends.count("created True") == 1
    assert store.get("alice").version == version_of(content)


def test_a_lot_of_bytes_is_safe_before_the_stream_ends(tmp_path: Path, store: AdapterStore) -> None:
    content = bytes(NOTE_BYTES + (1 << 20) + 1)
    upload = begin(store, "alice", content)
    for offset in range(0, NOTE_BYTES + (1 << 20), 1 << 20):
        upload.write(offset, content[: 1 << 20])
    upload_id = upload.request.upload_id
    assert upload.committed_size == NOTE_BYTES + (1 << 20)
    assert store.upload_status(upload_id).committed_size == NOTE_BYTES
    note = json.loads((upload.folder / "upload.json").read_text())
    assert note["committed_size"] == NOTE_BYTES
    upload.suspend()
    assert store.upload_status(upload_id).committed_size == NOTE_BYTES + (1 << 20)


@pytest.mark.parametrize("tail", [b"", bytes(9)], ids=["nothing", "noise"])
def test_what_was_never_said_to_be_safe_is_cut_off(
    tmp_path: Path, store: AdapterStore, restart: Restart, tail: bytes
) -> None:
    suspended(store, "alice", b"abcdef", 3)
    (tmp_path / "uploads" / "default" / ID / WEIGHTS).write_bytes(b"abc" + tail)
    store = restart()
    record = publish(store, "alice", b"abcdef", resume_offset=3)
    assert (store.blob(record.version) / WEIGHTS).read_bytes() == b"abcdef"


@pytest.mark.parametrize("restarted", [False, True])
def test_an_upload_that_lost_bytes_begins_anew(
    tmp_path: Path, store: AdapterStore, restart: Restart, restarted: bool
) -> None:
    suspended(store, "alice", b"abcdef", 3)
    (tmp_path / "uploads" / "default" / ID / WEIGHTS).write_bytes(b"ab")
    store = restart() if restarted else store
    error = refused("OFFSET_MISMATCH", begin, store, at=3)
    assert error.metadata == {"committed_size": "0"}
    publish(store, "alice", b"abcdef")


def test_uploads_expire(tmp_path: Path, store: AdapterStore, clock: Clock) -> None:
    suspended(store, "alice", b"abcdef", 3)
    assert store.upload_status(ID).expire_time == 1_060.0
    clock.now += 59
    live = begin(store, at=3)
    clock.now += 1_000  # it does not expire under its stream
    store.sweep()
    assert store.upload_status(ID).expire_time == clock.now + 60
    live.write(3, b"d")
    live.suspend()
    clock.now += 59
    store.sweep()
    assert store.upload_status(ID).committed_size == 4
    clock.now += 1
    refused("UPLOAD_NOT_FOUND", store.upload_status, ID)
    refused("OFFSET_MISMATCH", begin, store, at=4)
    assert uploads_below(tmp_path) == set()


@pytest.mark.parametrize("after", [59.0, 60.0])
def test_uploads_expire_while_no_server_runs(
    tmp_path: Path, store: AdapterStore, restart: Restart, clock: Clock, after: float
) -> None:
    suspended(store, "alice", b"abcdef", 3)
    publish(store, "bob")
    clock.now += after
    restart()
    assert (uploads_below(tmp_path) == set()) == (after == 60.0)


def test_an_upload_of_nothing_is_not_kept(tmp_path: Path, store: AdapterStore) -> None:
    begin(store).suspend()
    refused("UPLOAD_NOT_FOUND", store.upload_status, ID)
    assert uploads_below(tmp_path) == set()


def test_a_published_upload_is_remembered(
    tmp_path: Path, store: AdapterStore, restart: Restart, clock: Clock
) -> None:
    record = publish(store, "alice", b"abcdef")
    for _ in range(2):
        status = store.upload_status(ID)
        assert (status.committed_size, status.record, status.expire_time) == (6, record, 1_060.0)
        assert uploads_below(tmp_path) == {f"{ID}/upload.json"}
        store = restart()
    clock.now += 60
    refused("UPLOAD_NOT_FOUND", store.upload_status, ID)
    store.sweep()
    assert uploads_below(tmp_path) == set()


def test_what_was_published_can_be_uploaded_again(store: AdapterStore) -> None:
    """The same content under the same name has the same upload_id, whatever happened since."""
    first = publish(store, "alice", b"abcdef")
    publish(store, "alice", b"other", replace=True)
    refused("UPLOAD_NOT_FOUND", store.upload_status, ID)
    request = request_for("alice", b"abcdef", replace=True)
    refused("OFFSET_MISMATCH", store.begin, replace(request, resume_offset=6))
    upload = store.begin(request)
    upload.write(0, b"abc")
    upload.suspend()
    assert store.upload_status(ID).committed_size == 3
    again = publish(store, "alice", b"abcdef", replace=True, resume_offset=3)
    assert (again.version, again.etag != first.etag) == (first.version, True)
    assert store.upload_status(ID).record == again
    store.delete("alice")
    publish(store, "alice", b"abcdef")


def test_a_leftover_can_be_cleared(tmp_path: Path, store: AdapterStore) -> None:
    request = suspended(store, "alice", b"abcdef", 3)
    publish(store, "alice", b"abcdef", upload_id=request_for("x", b"").upload_id)
    for other in (
        request_for("bob", b"abcdef", upload_id=request.upload_id),
        request_for("alice", b"other", upload_id=request.upload_id),
    ):
        store.clear_upload(other)
    assert store.upload_status(request.upload_id).committed_size == 3
    store.clear_upload(request)
    refused("UPLOAD_NOT_FOUND", store.upload_status, request.upload_id)
    store.clear_upload(request)
    store.clear_upload(replace(request, upload_id=request_for("x", b"").upload_id))
    assert store.upload_status(request_for("x", b"").upload_id).record is not None  # stays
    live = begin(store)
    store.clear_upload(request)
    live.write(0, b"abcdef")
    assert live.finish() == version_of(b"abcdef")
    live.discard()


def test_sizes_that_cannot_be_taken_are_refused_at_once(store: AdapterStore) -> None:
    assert refused("INVALID_FIELD", begin, store, "a", b"").field == "header.total_size"
    too_large = request_for("a", b"", total_size=MAX_BYTES + 1)
    assert refused("ADAPTER_TOO_LARGE", store.begin, too_large).field == "header.total_size"
    store.close()
    refused("STORE_UNAVAILABLE", begin, store)


class SmallDisk(QuickDisk):
    """Has room for 100 bytes more, however many were written."""

    def free_bytes(self, path: Path) -> int:
        return 100


def test_room_is_kept_for_the_rest_of_what_runs(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk=SmallDisk())
    refused("DISK_FULL", begin, store, "a", bytes(101))
    first = begin(store, "a", bytes(60))
    refused("DISK_FULL", begin, store, "b", bytes(41))
    second = begin(store, "b", bytes(40))
    first.write(0, bytes(50))  # which the disk has counted
    third = begin(store, "c", bytes(50))
    refused("DISK_FULL", begin, store, "d", bytes(1))
    third.discard()
    second.discard()
    first.suspend()  # nobody is sending the rest
    fourth = begin(store, "d", bytes(95))
    error = refused("DISK_FULL", begin, store, "a", bytes(60), 50)
    assert error.field is None
    fourth.discard()
    begin(store, "a", bytes(60), 50).discard()
    store.close()


def test_parallel_uploads_cannot_have_the_same_room(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk=SmallDisk())
    barrier = Barrier(8)

    def start(number: int) -> str:
        barrier.wait()
        try:
            begin(store, f"n{number}", bytes(40))
        except RequestError as error:
            return error.reason.name
        return "begun"

    with ThreadPoolExecutor(8) as workers:
        assert sorted(workers.map(start, range(8))) == ["DISK_FULL"] * 6 + ["begun"] * 2
    store.close()


class AwkwardDisk(QuickDisk):
    """Writes as little as it may; `code` fails the next write, or the next fsync of a file."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.fails_sync = False

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        written = super().pwrite(fd, data[:2], offset)
        self._fail(self.code)
        return written

    def sync_file(self, fd: int) -> None:
        self._fail(errno.EIO if self.fails_sync else None)
        super().sync_file(fd)

    def _fail(self, code: int | None) -> None:
        if code is not None:
            raise OSError(code, os.strerror(code), "/secret/path")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "DISK_FULL"),
        (errno.EDQUOT, "DISK_FULL"),
        (errno.EIO, "STORE_UNAVAILABLE"),
        (errno.EROFS, "STORE_UNAVAILABLE"),
    ],
)
def test_a_write_that_fails_has_a_reason_and_no_path(
    tmp_path: Path, code: int, reason: str
) -> None:
    disk = AwkwardDisk()
    store = open_store(tmp_path, disk=disk)
    upload = begin(store)
    upload.write(0, b"abc")
    disk.code = code
    error = refused(reason, upload.write, 3, b"xyz")
    assert "/secret" not in error.message
    disk.code = None
    upload.write(3, b"def")
    assert upload.finish() == hashlib.sha256(b"abcdef").hexdigest()
    assert upload.path.read_bytes() == b"abcdef"
    upload.discard()
    store.close()


def test_a_disk_that_writes_nothing_fails(tmp_path: Path) -> None:
    class DeafDisk(QuickDisk):
        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            return 0

    store = open_store(tmp_path, disk=DeafDisk())
    refused("STORE_UNAVAILABLE", begin(store).write, 0, b"abc")
    store.close()


def test_after_a_failed_fsync_only_what_was_safe_before_counts(tmp_path: Path) -> None:
    """The kernel may drop what it could not write, and call the next fsync good."""
    disk = AwkwardDisk()
    store = open_store(tmp_path, disk=disk)
    suspended(store, "alice", b"abcdef", 3)
    upload = begin(store, at=3)
    upload.write(3, b"def")
    disk.fails_sync = True
    refused("STORE_UNAVAILABLE", upload.finish)
    disk.fails_sync = False
    refused("UPLOAD_INCOMPLETE", upload.finish)
    upload.suspend()
    assert store.upload_status(ID).committed_size == 3
    upload = begin(store, at=3)
    upload.write(3, b"d")
    disk.fails_sync = True
    upload.suspend()
    disk.fails_sync = False
    assert publish(store, "alice", b"abcdef", resume_offset=3).version == version_of(b"abcdef")
    store.close()


@pytest.mark.parametrize("killed", [False, True])
def test_an_upload_outlives_a_publication_that_failed(tmp_path: Path, killed: bool) -> None:
    class FailingDisk(QuickDisk):
        def rename(self, source: Path, target: Path) -> None:
            if source.name == "blob":  # the very step that would make a version of it
                raise OSError(errno.EIO, "no")
            super().rename(source, target)

    store = open_store(tmp_path / "store", disk=FailingDisk())
    suspended(store, "alice", b"abcdef", 3)
    upload, sha256 = uploaded(store, "alice", b"abcdef", resume_offset=3)
    refused("STORE_UNAVAILABLE", store.publish, upload, sha256, SPEC, sha256)
    left = copytree(tmp_path / "store", tmp_path / "left")
    upload.suspend()
    assert store.upload_status(ID).committed_size == 6
    store.close()
    again = open_store(left if killed else tmp_path / "store")
    committed = again.upload_status(ID).committed_size
    assert committed == (3 if killed else 6)
    assert publish(again, "alice", b"abcdef", resume_offset=committed).version == sha256
    again.close()


def test_closing_keeps_what_has_come(store: AdapterStore, restart: Restart) -> None:
    upload = begin(store)
    upload.write(0, b"abcd")
    finished, sha256 = uploaded(store, "bob", b"other")  # and is being published
    store.close()
    refused("UPLOAD_INCOMPLETE", upload.write, 4, b"ef")
    refused("STORE_UNAVAILABLE", store.publish, finished, sha256, SPEC, sha256)
    assert restart().upload_status(ID).committed_size == 4
