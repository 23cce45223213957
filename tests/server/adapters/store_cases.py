"""What the tests of the adapter store share: small adapters, uploads of them, disks with faults.

The version of a test's adapter is the sha256 of its bytes, so that content can be told from it.
"""

import hashlib
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loraplex.adapters.peft import AdapterSpec
from loraplex.adapters.store import AdapterRecord, AdapterState, AdapterStore, Upload, UploadRequest
from loraplex.adapters.store_files import Disk
from loraplex.errors import RequestError

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
MAX_BYTES = 16 << 20
WEIGHTS = "adapter_model.safetensors"


class QuickDisk(Disk):
    """Waits for no device: without a power cut nobody can tell, and that is test_store_power's."""

    def sync_file(self, fd: int) -> None:
        pass

    def sync(self, path: Path) -> None:
        assert path.exists()


def open_store(root: Path, **options: Any) -> AdapterStore:
    return AdapterStore.open(root, BASE, MAX_BYTES, **({"disk": QuickDisk()} | options))


def version_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def request_for(name: str, content: bytes, **changes: Any) -> UploadRequest:
    """The upload_id is the content's under this name, as a client's is."""
    sha256 = version_of(content)
    fields: dict[str, Any] = {
        "adapter_id": name,
        "upload_id": str(uuid.uuid5(uuid.NAMESPACE_OID, name + sha256)),
        "total_size": len(content),
        "sha256": sha256,
        "config_json": CONFIG,
    }
    return UploadRequest(**(fields | changes))


def uploaded(store: AdapterStore, name: str, content: bytes, **changes: Any) -> tuple[Upload, str]:
    """A finished upload and its sha256."""
    request = request_for(name, content, **changes)
    upload = store.begin(request)
    middle = (request.resume_offset + len(content)) // 2
    try:
        upload.write(request.resume_offset, content[request.resume_offset : middle])
        upload.write(middle, content[middle:])
        return upload, upload.finish()
    except RequestError:
        upload.suspend()
        raise


def publish(
    store: AdapterStore, name: str, content: bytes = b"weights", **changes: Any
) -> AdapterRecord:
    upload, sha256 = uploaded(store, name, content, **changes)
    try:
        return store.publish(upload, version_of(content), SPEC, sha256)[0]
    finally:
        upload.suspend()


def publish_as_a_client_does(store: AdapterStore, name: str, content: bytes) -> AdapterRecord:
    """Goes on from what the server has."""
    try:
        status = store.upload_status(request_for(name, content).upload_id)
    except RequestError:
        return publish(store, name, content, replace=True)
    if status.record is not None:
        return status.record
    return publish(store, name, content, replace=True, resume_offset=status.committed_size)


def suspended(store: AdapterStore, name: str, content: bytes, num_bytes: int) -> UploadRequest:
    """An upload whose stream ended after `num_bytes`; its request."""
    request = request_for(name, content)
    upload = store.begin(request)
    upload.write(0, content[:num_bytes])
    upload.suspend()
    return request


def refused(reason: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **kwargs)
    assert caught.value.reason.name == reason
    return caught.value


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def blob_of(root: Path, content: bytes) -> Path:
    version = version_of(content)
    return root / "blobs" / "sha256" / version[:2] / version


def versions_on_disk(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs" / "sha256").glob("*/*")}


def states(store: AdapterStore) -> dict[str, AdapterState]:
    return {record.adapter_id: record.state for record in store.list(0, "")[0]}


def check_sound(store: AdapterStore, root: Path) -> None:
    """Whatever is READY is whole, nothing lies about that nobody names."""
    records = store.list(0, "")[0]
    for record in records:
        if record.state is AdapterState.READY:
            store.verify(record.version)
            assert version_of((store.blob(record.version) / WEIGHTS).read_bytes()) == record.version
    assert versions_on_disk(root) <= {record.version for record in records}
    assert files_below(root / "tmp") == set()


class FaultyDisk(QuickDisk):
    """At its step number `at` it fails, as `fail` and `how` say, and goes on as if healthy.

    `how`: "torn", half-way through the step if it has a half, else before its effect; "after" it;
    "dead" is before it, and every later step fails too.
    """

    def __init__(self, fail: Callable[[], BaseException], how: str) -> None:
        self.fail = fail
        self.how = how
        self.at: int | None = None  # None: no fault
        self.steps = 0

    def _step(self, effect: Callable[..., Any], *args: Any) -> Any:
        self.steps += 1
        if self.at is None or self.steps < self.at or (self.steps > self.at and self.how != "dead"):
            return effect(*args)
        if self.how == "torn" and effect == super().pwrite:
            fd, data, offset = args
            effect(fd, data[: len(data) // 2], offset)
        if self.how == "torn" and effect == super().remove_folder:
            for path in [path for path in args[0].rglob("*") if path.is_file()][:1]:
                path.unlink()
        if self.how == "after":
            effect(*args)
        error = self.fail()
        if effect != super().remove_folder:  # which goes as far as it goes, and says nothing
            raise error
        return None

    def make(self, path: Path) -> None:
        self._step(super().make, path)

    def open(self, path: Path, size: int) -> int:
        return int(self._step(super().open, path, size))

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return int(self._step(super().pwrite, fd, data, offset))

    def sync_file(self, fd: int) -> None:
        self._step(super().sync_file, fd)

    def sync(self, path: Path) -> None:
        self._step(super().sync, path)

    def rename(self, source: Path, target: Path) -> None:
        self._step(super().rename, source, target)

    def remove(self, path: Path) -> None:
        self._step(super().remove, path)

    def remove_folder(self, path: Path) -> None:
        self._step(super().remove_folder, path)


def kill() -> BaseException:
    """Nothing that follows reaches the disk."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")
