"""The adapter store after a kill or a failing disk at every single step, and after old damage."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import pytest
from loraplex.adapters.peft import AdapterSpec
from loraplex.adapters.store import AdapterState, AdapterStore
from loraplex.adapters.store_files import Disk
from loraplex.errors import RequestError

SPEC = AdapterSpec(
    modules=(),
    rank=8,
    target_modules=("q_proj",),
    warnings=(),
    config_json="{}",
    uploaded_config_json='{"r": 8}',
)
OLD, NEW = b"old weights", b"new weights"
WEIGHTS = "adapter_model.safetensors"


class KilledError(BaseException):
    """The process ends here: nothing that follows reaches the disk."""


class FaultyDisk(Disk):
    """Fails at step `at`, before its effect, after it, or half-way through a write."""

    def __init__(self, error: BaseException, how: str) -> None:
        self.error = error
        self.how = how
        self.at: int | None = None  # None: no fault
        self.steps = 0

    def _step(self, effect: Callable[..., Any], *args: Any) -> None:
        self.steps += 1
        fault = self.at is not None and self.steps == self.at
        dead = isinstance(self.error, KilledError) and self.at and self.steps > self.at
        if fault and self.how == "torn" and effect == super().write:
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        if fault and self.how == "after":
            effect(*args)
        if fault or dead:
            raise self.error
        effect(*args)

    def make_folder(self, path: Path) -> None:
        self._step(super().make_folder, path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(super().write, path, data)

    def sync(self, path: Path) -> None:
        self._step(super().sync, path)

    def move(self, source: Path, target: Path) -> None:
        self._step(source.replace, target)
        self.sync(target.parent)

    def remove(self, path: Path) -> None:
        self._step(super().remove, path)

    def remove_folder(self, path: Path) -> None:
        self._step(super().remove_folder, path)


def open_store(root: Path, disk: Disk | None = None) -> AdapterStore:
    return AdapterStore.open(root, "base", 1 << 20, disk=disk)


def version_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def publish(store: AdapterStore, name: str, content: bytes) -> bool:
    upload = store.begin(name, len(content))
    upload.write(0, content)
    sha256 = upload.finish()
    try:
        return store.publish(upload, name, version_of(content), SPEC, sha256, "private")[1]
    finally:
        upload.discard()


def with_old(root: Path) -> None:
    """`kept` and `old` name one version; `spoilt` another, whose bytes are damaged."""
    store = open_store(root)
    publish(store, "kept", OLD)
    publish(store, "old", OLD)
    publish(store, "spoilt", b"good bytes")
    (store.blob(version_of(b"good bytes")) / WEIGHTS).write_bytes(b"bad")
    store.close()


def touch_and_close(store: AdapterStore) -> None:
    store.touch("kept")
    store.close()


ACTIONS: dict[str, Callable[[AdapterStore], Any]] = {
    "publish new content": lambda store: publish(store, "new", NEW),
    "publish known content": lambda store: publish(store, "new", OLD),
    "repair": lambda store: publish(store, "spoilt", b"good bytes"),
    "delete one of two": lambda store: store.delete("old"),
    "delete the last": lambda store: store.delete("spoilt"),
    "close": touch_and_close,
}
CONTENT = {"kept": OLD, "old": OLD, "spoilt": b"good bytes"}


def check(store: AdapterStore, root: Path, new: bytes) -> dict[str, AdapterState]:
    """Whatever is READY is whole; nothing lies about that nobody names."""
    records = store.list(0, "")[0]
    for record in records:
        if record.state is AdapterState.READY:
            store.verify(record.version)
            content = (store.blob(record.version) / WEIGHTS).read_bytes()
            assert content == (CONTENT | {"new": new})[record.adapter_id]
    assert list((root / "uploads" / "default").iterdir()) == []
    on_disk = {path.name for path in (root / "blobs" / "sha256").glob("*/*")}
    assert on_disk <= {record.version for record in records}
    return {record.adapter_id: record.state for record in records}


def expected_states(action: str, done: bool) -> list[dict[str, AdapterState]]:
    """What may be found after the action was acknowledged, or was cut off."""
    before = {
        "kept": AdapterState.READY,
        "old": AdapterState.READY,
        "spoilt": AdapterState.QUARANTINED,
    }
    after = {
        "publish new content": before | {"new": AdapterState.READY},
        "publish known content": before | {"new": AdapterState.READY},
        "repair": before | {"spoilt": AdapterState.READY},
        "delete one of two": {k: v for k, v in before.items() if k != "old"},
        "delete the last": {k: v for k, v in before.items() if k != "spoilt"},
        "close": before,
    }[action]
    return [after] if done else [before, after]


@pytest.mark.parametrize("how", ["before", "after", "torn"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_step_leaves_all_or_nothing(tmp_path: Path, action: str, how: str) -> None:
    with_old(tmp_path / "prepared")
    new = OLD if action == "publish known content" else NEW
    done, at = False, 0
    while not done:
        at += 1
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "prepared", root)
        disk = FaultyDisk(KilledError(), how)
        store = open_store(root, disk)
        disk.steps, disk.at = 0, at
        with contextlib.suppress(KilledError):
            ACTIONS[action](store)
            done = True
        with contextlib.suppress(KilledError):
            store.close()
        again = open_store(root)
        assert check(again, root, new) in expected_states(action, done)
        again.close()
    assert at >= 3


@pytest.mark.parametrize(("code", "reason"), [(ENOSPC, "DISK_FULL"), (EIO, "STORE_UNAVAILABLE")])
@pytest.mark.parametrize("how", ["before", "after", "torn"])
@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "close"])
def test_a_disk_that_fails_at_any_step_harms_nothing(
    tmp_path: Path, action: str, how: str, code: int, reason: str
) -> None:
    with_old(tmp_path / "prepared")
    new = OLD if action == "publish known content" else NEW
    done, at, reasons = False, 0, set()
    while not done:
        at += 1
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "prepared", root)
        disk = FaultyDisk(OSError(code, "no"), how)
        store = open_store(root, disk)
        disk.steps, disk.at = 0, at
        with contextlib.suppress(OSError):  # of clearing up, which is swept at the next start
            try:
                ACTIONS[action](store)
                done = disk.steps < at
            except RequestError as error:
                reasons.add(error.reason.name)
        disk.at = None
        found = {record.adapter_id: record.state for record in store.list(0, "")[0]}
        assert found in expected_states(action, done)
        store.close()
        again = open_store(root)
        assert check(again, root, new) in expected_states(action, done)
        again.close()
    assert (at >= 3, reasons) == (True, {reason})


def damaged(root: Path, harm: Callable[[Path], Any]) -> AdapterStore:
    store = open_store(root)
    publish(store, "alice", OLD)
    publish(store, "bob", NEW)
    store.close()
    harm(root)
    return open_store(root)


def blob_of(root: Path, content: bytes = OLD) -> Path:
    version = version_of(content)
    return root / "blobs" / "sha256" / version[:2] / version


HARMS: dict[str, Callable[[Path], Any]] = {
    "no blob": lambda root: shutil.rmtree(blob_of(root)),
    "no weights": lambda root: (blob_of(root) / WEIGHTS).unlink(),
    "no config": lambda root: (blob_of(root) / "adapter_config.json").unlink(),
    "short weights": lambda root: (blob_of(root) / WEIGHTS).write_bytes(OLD[:-1]),
    "no record": lambda root: (blob_of(root) / "record.json").unlink(),
    "half a record": lambda root: (blob_of(root) / "record.json").write_text('{"format": 1, "fi'),
    "an odd record": lambda root: (blob_of(root) / "record.json").write_text(
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
    assert (blob_of(tmp_path) / WEIGHTS).exists()
    assert store.get("bob").state is AdapterState.READY
    with pytest.raises(RequestError) as caught:
        publish(store, "alice", OLD)
    assert caught.value.reason.name == "ADAPTER_EXISTS"
    store.touch("alice")
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
    def leave(root: Path) -> None:
        uploads = root / "uploads" / "default"
        shutil.copytree(blob_of(root), uploads / "0123" / "blob")
        (uploads / "0123" / WEIGHTS).write_bytes(b"half")
        (uploads / "4567").write_text('{"format": 1}')
        orphan = root / "blobs" / "sha256" / "00" / ("00" * 32)
        shutil.copytree(blob_of(root), orphan)

    store = damaged(tmp_path, leave)
    assert [path.name for path in tmp_path.glob("uploads/*/*")] == []
    versions = {record.version for record in store.list(0, "")[0]}
    assert {path.name for path in tmp_path.glob("blobs/*/*/*")} == versions
    assert len(versions) == 2
    store.close()


def test_files_that_are_not_the_stores_are_left_alone(tmp_path: Path) -> None:
    manifest = tmp_path / "manifests" / "default" / "Not An Id.json"
    store = damaged(tmp_path, lambda root: manifest.write_text("mine"))
    assert [record.adapter_id for record in store.list(0, "")[0]] == ["alice", "bob"]
    store.close()
    assert manifest.read_text() == "mine"
