"""The adapter store: names, versions, references, pins, and what a restart finds."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from loraplex.adapters.store import (
    AdapterRecord,
    AdapterState,
    AdapterStore,
    Visibility,
    validate_adapter_id,
)
from loraplex.errors import InvalidRequestError, StartupError

from tests.server.adapters.store_cases import (
    BASE,
    CONFIG,
    MAX_BYTES,
    SPEC,
    WEIGHTS,
    QuickDisk,
    files_below,
    open_store,
    publish,
    refused,
    request_for,
    uploaded,
    version_of,
    versions_on_disk,
)

NOW = 1_700_000_000.25


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path, clock=lambda: NOW)
    yield opened
    opened.close()


def test_a_published_adapter_survives_a_restart(tmp_path: Path, store: AdapterStore) -> None:
    upload, sha256 = uploaded(store, "alice", b"weights")
    assert sha256 == version_of(b"weights")
    record, created, _ = store.publish(upload, sha256, SPEC, sha256)
    assert created
    assert record == AdapterRecord(
        adapter_id="alice",
        version=sha256,
        etag=record.etag,
        size_bytes=7,
        rank=8,
        target_modules=("q_proj", "v_proj"),
        state=AdapterState.READY,
        visibility=Visibility.PRIVATE,
        create_time=NOW,
        last_used_time=None,
        owner="default",
        base_id=BASE,
    )
    folder = store.blob(sha256)
    assert folder == tmp_path / "blobs" / "sha256" / sha256[:2] / sha256
    assert (folder / WEIGHTS).read_bytes() == b"weights"
    assert (folder / "adapter_config.json").read_text() == CONFIG
    store.close()
    again = open_store(tmp_path)
    assert again.get("alice") == record
    assert again.blob(sha256) == folder
    again.verify(sha256)
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
    error = refused("INVALID_FIELD", store.begin, request_for(name, b"x"))
    assert error.field == "header.adapter_id"


def test_the_same_content_again_is_the_same_adapter(store: AdapterStore) -> None:
    first = publish(store, "alice")
    upload, sha256 = uploaded(store, "alice", b"weights")
    assert store.publish(upload, first.version, SPEC, sha256) == (first, False, False)
    assert publish(store, "alice", replace=True) == first
    assert publish(store, "alice", if_match_etag="stale") == first


def test_other_content_needs_replace_or_the_etag(store: AdapterStore) -> None:
    first = publish(store, "alice", b"one")
    refused("ADAPTER_EXISTS", store.begin, request_for("alice", b"two"))
    stale = refused("ETAG_MISMATCH", store.begin, request_for("alice", b"2", if_match_etag="stale"))
    absent = request_for("nobody", b"two", if_match_etag=first.etag)
    assert stale.metadata == {"etag": first.etag}
    assert refused("ETAG_MISMATCH", store.begin, absent).metadata == {}
    second = publish(store, "alice", b"two", replace=True)
    assert (second.version, store.get("alice")) == (version_of(b"two"), second)
    third = publish(store, "alice", b"three", if_match_etag=second.etag)
    assert store.get("alice") == third
    assert len({first.etag, second.etag, third.etag}) == 3
    # Both: the etag decides.
    changes = {"if_match_etag": second.etag, "replace": True}
    refused("ETAG_MISMATCH", store.begin, request_for("alice", b"four", **changes))


def test_the_rules_are_checked_again_at_the_end(store: AdapterStore) -> None:
    first = publish(store, "alice", b"one")
    upload, sha256 = uploaded(store, "alice", b"two", if_match_etag=first.etag)
    store.delete("alice")
    refused("ETAG_MISMATCH", store.publish, upload, sha256, SPEC, sha256)
    upload.suspend()  # all of it is kept: the next stream only has to finish
    assert store.upload_status(upload.request.upload_id).committed_size == 3
    assert publish(store, "alice", b"two", resume_offset=3).version == sha256


def test_what_happens_while_the_content_is_written_counts_too(tmp_path: Path) -> None:
    class BusyDisk(QuickDisk):
        def make(self, path: Path) -> None:
            super().make(path)
            if path.name == "blob" and path.parent.name == upload.request.upload_id:
                store.delete("alice")

    store = open_store(tmp_path)
    first = publish(store, "alice", b"one")
    store.close()
    store = open_store(tmp_path, disk=BusyDisk())
    upload, sha256 = uploaded(store, "alice", b"two", if_match_etag=first.etag)
    refused("ETAG_MISMATCH", store.publish, upload, sha256, SPEC, sha256)
    refused("ADAPTER_NOT_FOUND", store.get, "alice")
    upload.suspend()
    assert versions_on_disk(tmp_path) == set()
    store.close()


def test_the_same_weights_with_another_config_are_other_content(store: AdapterStore) -> None:
    publish(store, "alice", b"one")
    upload, sha256 = uploaded(store, "alice", b"one")
    refused("ADAPTER_EXISTS", store.publish, upload, "c" * 64, SPEC, sha256)
    upload.discard()
    upload, sha256 = uploaded(store, "alice", b"one", replace=True)
    assert store.publish(upload, "c" * 64, SPEC, sha256)[1]


def test_a_replaced_version_lives_until_its_last_reader(
    tmp_path: Path, store: AdapterStore
) -> None:
    old = publish(store, "alice", b"old")
    held = store.acquire("alice")
    new = publish(store, "alice", b"new", replace=True)
    assert (held.version, store.acquire("alice").version) == (old.version, new.version)
    assert [store.references(record.version) for record in (old, new)] == [1, 1]
    store.verify(old.version)
    store.release(old.version)
    store.sweep()
    assert versions_on_disk(tmp_path) == {new.version}
    assert store.references(old.version) == 0
    store.release(new.version)
    assert versions_on_disk(tmp_path) == {new.version}


def test_two_names_share_one_blob_until_the_last_goes(tmp_path: Path, store: AdapterStore) -> None:
    first, second = publish(store, "alice"), publish(store, "bob")
    assert first.version == second.version
    assert first.etag != second.etag
    assert len(files_below(tmp_path / "blobs")) == 3
    store.delete("alice")
    refused("ADAPTER_NOT_FOUND", store.get, "alice")
    assert (store.blob(second.version) / WEIGHTS).exists()
    store.delete("bob")
    assert versions_on_disk(tmp_path) == set()
    for call in (store.blob, store.verify):
        refused("ADAPTER_NOT_FOUND", call, second.version)
    refused("ADAPTER_NOT_FOUND", store.acquire, "bob")
    refused("ADAPTER_NOT_FOUND", store.delete, "bob")


def test_a_reader_keeps_a_deleted_adapters_files(tmp_path: Path) -> None:
    removed: list[tuple[str, bool]] = []
    go = Event()

    def on_removed(version: str) -> None:
        removed.append((version, folder.exists()))
        assert go.wait(10)

    store = open_store(tmp_path, on_removed=on_removed)
    version = publish(store, "alice").version
    folder = store.blob(version)
    store.acquire("alice")
    store.acquire("alice")
    store.delete("alice")
    refused("ADAPTER_NOT_FOUND", store.get, "alice")
    store.release(version)
    store.verify(version)
    assert (folder / WEIGHTS).read_bytes() == b"weights"
    assert removed == []
    store.release(version)  # does not wait for the disk
    go.set()
    store.sweep()
    assert versions_on_disk(tmp_path) == set()
    assert removed == [(version, True)]  # told before its files went
    store.close()


def test_a_deleted_adapter_may_come_back_while_it_is_read(store: AdapterStore) -> None:
    version = publish(store, "alice").version
    store.acquire("alice")
    store.delete("alice")
    publish(store, "bob")
    store.release(version)
    assert (store.blob(version) / WEIGHTS).exists()


def test_a_version_that_is_being_checked_is_kept(tmp_path: Path, store: AdapterStore) -> None:
    version = publish(store, "alice").version
    read: list[int] = []

    def delete(num_bytes: int) -> None:
        read.append(num_bytes)
        if len(read) == 1:
            store.delete("alice")
        assert versions_on_disk(tmp_path) == {version}
        assert store.references(version) == 0

    store.scrub(version, delete)
    assert sum(read) == len(b"weights") + len(CONFIG)
    assert versions_on_disk(tmp_path) == set()


def test_a_pin_belongs_to_the_name(tmp_path: Path, store: AdapterStore) -> None:
    first = publish(store, "alice", b"one")
    publish(store, "bob", b"one")
    assert store.pinned() == ()
    pinned = store.set_pinned("alice", True)
    assert (pinned.pinned, pinned.etag) == (True, first.etag)
    assert store.set_pinned("alice", True) == pinned == store.get("alice")
    replaced = publish(store, "alice", b"two", replace=True)
    assert store.pinned() == (replaced,)
    store.close()
    again = open_store(tmp_path)
    assert again.pinned() == (replaced,)
    again.set_pinned("bob", True)
    assert [record.adapter_id for record in again.pinned()] == ["alice", "bob"]
    again.set_pinned("alice", False)
    again.delete("bob")
    assert again.pinned() == ()
    assert not publish(again, "bob", b"one").pinned
    refused("ADAPTER_NOT_FOUND", again.set_pinned, "nobody", True)
    again.close()


def test_what_kind_an_adapter_is_survives_too(tmp_path: Path, store: AdapterStore) -> None:
    upload, sha256 = uploaded(store, "alice", b"weights")
    spec = replace(SPEC, use_dora=True, invocation_tokens=(3, 4))
    record = store.publish(upload, sha256, spec, sha256).record
    assert (record.use_dora, record.invocation_tokens) == (True, (3, 4))
    store.close()
    again = open_store(tmp_path)
    assert again.get("alice") == record
    again.close()


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path, store: AdapterStore) -> None:
    record = publish(store, "alice")
    store.close()
    manifest = tmp_path / "manifests" / "default" / "alice.json"
    fields = json.loads(manifest.read_text())
    for name in ("pinned", "use_dora", "invocation_tokens"):
        del fields[name]
    manifest.write_text(json.dumps(fields))
    shutil.rmtree(tmp_path / "last_used")
    again = open_store(tmp_path)
    assert again.get("alice") == record
    again.close()


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


def test_a_store_of_two_thousand(tmp_path: Path, store: AdapterStore) -> None:
    publish(store, "n0")
    store.close()
    manifests = tmp_path / "manifests" / "default"
    text = (manifests / "n0.json").read_text()
    for number in range(1, 2_000):
        (manifests / f"n{number}.json").write_text(text.replace('"n0"', f'"n{number}"'))
    again = open_store(tmp_path)
    assert [len(again.list(size, "")[0]) for size in (0, 3, 1_000, 5_000)] == [50, 3, 1_000, 1_000]
    assert refused("INVALID_FIELD", again.list, -1, "").field == "page_size"
    names: list[str] = []
    token = ""
    while not names or token:
        records, token = again.list(300, token)
        names += [record.adapter_id for record in records]
    assert names == sorted(f"n{number}" for number in range(2_000))
    again.delete("n7")
    assert versions_on_disk(tmp_path) == {version_of(b"weights")}
    again.close()


@pytest.mark.parametrize("token", ["x", "YQ", "YQ==\n", "L2V0Yw==", "é", "=", "YQ==YQ=="])
def test_a_token_that_was_never_given_is_refused(store: AdapterStore, token: str) -> None:
    assert refused("INVALID_FIELD", store.list, 0, token).field == "page_token"


def test_the_last_use_is_written_down_now_and_then(tmp_path: Path) -> None:
    times = [1.0]
    store = open_store(tmp_path, clock=lambda: times[0])
    publish(store, "alice")
    publish(store, "bob", b"other")
    times[0] = 3.0
    assert store.acquire("alice").last_used_time == 3.0
    store.release(version_of(b"weights"))
    assert store.get("alice").last_used_time == 3.0
    assert store.set_pinned("alice", True).last_used_time == 3.0
    store.sweep()
    times[0] = 4.0
    store.release(store.acquire("bob").version)
    records = store.list(0, "")[0]
    store.close()
    again = open_store(tmp_path, clock=lambda: 9.0)
    assert again.list(0, "")[0] == records
    # It is the name's, and goes with it.
    assert publish(again, "alice", b"new", replace=True).last_used_time == 3.0
    again.delete("bob")
    again.close()
    last = open_store(tmp_path, clock=lambda: 9.0)
    assert last.get("alice").last_used_time == 3.0
    assert publish(last, "bob", b"other").last_used_time is None
    last.close()


def test_another_base_makes_adapters_incompatible(tmp_path: Path, store: AdapterStore) -> None:
    record = publish(store, "alice")
    store.close()
    other = AdapterStore.open(tmp_path, "c" * 64, MAX_BYTES)
    assert other.get("alice").state is AdapterState.INCOMPATIBLE
    assert other.list(0, "")[0][0].state is AdapterState.INCOMPATIBLE
    assert (other.blob(record.version) / WEIGHTS).exists()
    refused("ADAPTER_UNUSABLE", other.acquire, "alice")
    refused("ADAPTER_UNUSABLE", other.set_pinned, "alice", True)
    refused("ADAPTER_EXISTS", other.begin, request_for("alice", b"weights"))
    other.close()
    back = open_store(tmp_path)
    assert back.get("alice") == record
    back.close()


def test_many_threads_publish_read_and_delete_at_once(tmp_path: Path, store: AdapterStore) -> None:
    def work(number: int) -> None:
        name, content = f"n{number % 4}-{number}", bytes([number % 3])
        publish(store, name, content)
        record = store.acquire(name)
        store.verify(record.version)
        store.list(0, "")
        store.delete(name)
        assert (store.blob(record.version) / WEIGHTS).read_bytes() == content
        store.release(record.version)

    with ThreadPoolExecutor(8) as workers:
        for done in [workers.submit(work, number) for number in range(96)]:
            done.result()
    assert store.list(0, "") == ((), "")
    store.sweep()
    assert versions_on_disk(tmp_path) == set()
    assert files_below(tmp_path / "tmp") == set()


def test_a_name_is_never_without_a_version_while_it_is_replaced(store: AdapterStore) -> None:
    contents = [bytes([number]) for number in range(12)]
    publish(store, "alice", contents[0])
    done = Event()

    def read() -> set[str]:
        seen = set()
        while not done.is_set():
            record = store.acquire("alice")
            assert version_of((store.blob(record.version) / WEIGHTS).read_bytes()) in versions
            seen.add(record.version)
            store.release(record.version)
        return seen

    versions = {version_of(content) for content in contents}
    with ThreadPoolExecutor(3) as workers:
        readers = [workers.submit(read) for _ in range(3)]
        try:
            for content in contents[1:]:
                publish(store, "alice", content, replace=True)
        finally:
            done.set()
        assert all(reader.result() <= versions for reader in readers)
    store.sweep()
    assert store.versions() == (version_of(contents[-1]),)
