"""Adapters on disk: immutable content under its version, names that point at it, uploads under way.

    lock                                held while a server has the store
    blobs/sha256/aa/<version>/          adapter_model.safetensors, adapter_config.json, record.json
    manifests/<tenant>/<name>.json      written last: with it the adapter exists
    uploads/<tenant>/...                temporary, swept when the store is opened

A crash at any moment leaves a name with all of its content, or no name.
"""

import base64
import contextlib
import fcntl
import logging
import os
import secrets
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

from loraplex.adapters.peft import CONFIG_NAME, AdapterSpec
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_blobs import RECORD_NAME, BlobStore
from loraplex.adapters.store_files import Disk, FileRecord, Upload, describe, storage_errors
from loraplex.adapters.store_records import (
    AdapterRecord,
    AdapterState,
    Visibility,
    files_bytes,
    is_adapter_id,
    is_digest,
    manifest_bytes,
    parse_manifest,
    unreadable_record,
    validate_adapter_id,
)
from loraplex.errors import InvalidRequestError, RequestError, StartupError

__all__ = [
    "AdapterRecord",
    "AdapterState",
    "AdapterStore",
    "Upload",
    "Visibility",
    "validate_adapter_id",
]

logger = logging.getLogger(__name__)

TENANT = "default"
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000


class AdapterStore:
    """The durable store of one server; made by `open`.

    `get`, `list`, `touch`, `blob` and `retain` only look at memory and may be called from the event
    loop; the other methods wait for the disk.
    """

    def __init__(
        self,
        root: Path,
        base_id: str,
        max_adapter_bytes: int,
        disk: Disk,
        clock: Callable[[], float],
        lock_fd: int,
    ) -> None:
        self._base_id = base_id
        self._max_adapter_bytes = max_adapter_bytes
        self._disk = disk
        self._clock = clock
        self._root = root
        self._manifests = root / "manifests" / TENANT
        self._temporary = root / "uploads" / TENANT
        self._blobs = BlobStore(root / "blobs" / "sha256", self._temporary, disk)
        self._lock = Lock()  # guards what follows, for moments only

        self._lock_fd: int | None = lock_fd  # None once closed
        self._records: dict[str, AdapterRecord] = {}  # judged anew when asked for
        self._ids: list[str] = []  # the records' keys, sorted
        self._uploads: dict[str, Upload] = {}
        self._touched: set[str] = set()  # names whose last_used_time is newer than on disk

    @classmethod
    def open(
        cls,
        root: Path,
        base_id: str,
        max_adapter_bytes: int,
        *,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
    ) -> "AdapterStore":
        """Lock the store, sweep what a crash left, and read every name."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as on_failure:
                lock_fd = _take_lock(root)
                on_failure.callback(os.close, lock_fd)
                store = cls(root, base_id, max_adapter_bytes, disk or Disk(), clock, lock_fd)
                store._recover()
                on_failure.pop_all()
        except OSError as error:
            raise StartupError(f"adapter store {root}: {error.strerror}") from error
        return store

    def begin(self, adapter_id: str, total_size: int) -> Upload:
        """Room for one upload to `adapter_id`, which no other upload may use until it ends."""
        validate_adapter_id(adapter_id, "header.adapter_id")
        self._check_size(total_size)
        folder = self._blobs.new_temporary()
        upload = Upload(self._disk, folder, adapter_id, total_size, self._forget)
        with self._lock:
            if self._lock_fd is None:
                raise RequestError("STORE_UNAVAILABLE", "the adapter store is closed")
            if adapter_id in self._uploads:
                raise RequestError(
                    "UPLOAD_IN_PROGRESS", f"another upload to {adapter_id} is under way"
                )
            self._uploads[adapter_id] = upload
        try:
            with storage_errors():
                upload.open()
        except BaseException:
            self._forget(upload)
            self._disk.remove_folder(folder)
            raise
        return upload

    def publish(
        self,
        upload: Upload,
        adapter_id: str,
        version: str,
        spec: AdapterSpec,
        sha256: str,
        visibility: str,
        extra_files: Mapping[str, Path] | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Give a finished upload its name; durable when this returns. False: it had it already.

        `sha256` is what `upload.finish` answered. `extra_files` are caches that belong to the
        version, moved from where they lie (best in `upload.folder`). The upload is over when this
        returns; when it raises, `upload.discard` is the caller's.
        """
        assert upload.adapter_id == adapter_id
        assert is_digest(version)
        with storage_errors():
            record = self._has(adapter_id, version)
            created = False
            if record is None or self._blobs.is_damaged(version):
                weights = FileRecord(upload.total_size, sha256)
                staged, files = self._stage(upload, spec, weights, extra_files or {})
                with self._blobs.exclusive():
                    record = self._has(adapter_id, version)
                    created = record is None
                    self._blobs.place(version, staged, files)
                    if record is None:
                        record = self._new_record(upload, version, spec, Visibility(visibility))
                        self._name(record)
        upload.discard()
        return self._judged(record), created

    def get(self, adapter_id: str) -> AdapterRecord:
        with self._lock:
            record = self._records.get(adapter_id)
        if record is None:
            raise RequestError("ADAPTER_NOT_FOUND", f"there is no adapter {adapter_id!r}")
        return self._judged(record)

    def list(self, page_size: int, page_token: str) -> tuple[tuple[AdapterRecord, ...], str]:
        """Records by adapter_id, and the token of the next page ("": this was the last)."""
        if page_size < 0:
            raise InvalidRequestError("page_size", "must not be negative")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        after = _read_token(page_token) if page_token else ""
        with self._lock:
            start = bisect_right(self._ids, after)
            ids = self._ids[start : start + size]
            more = start + size < len(self._ids)
            records = [self._records[adapter_id] for adapter_id in ids]
        return tuple(self._judged(record) for record in records), _token(ids[-1]) if more else ""

    def delete(self, adapter_id: str) -> None:
        """Take the name away at once; its content goes when nobody holds it any more."""
        with storage_errors(), self._blobs.exclusive():
            version = self.get(adapter_id).version
            manifest = self._manifest(adapter_id)
            self._disk.remove(manifest)
            with self._lock:
                del self._records[adapter_id]
                self._ids.remove(adapter_id)
                self._touched.discard(adapter_id)
            self._disk.sync(manifest.parent)
            self._blobs.unlink(version, adapter_id)

    def touch(self, adapter_id: str) -> None:
        """The adapter is used now; written down when the store is closed."""
        with self._lock:
            if record := self._records.get(adapter_id):
                self._records[adapter_id] = replace(record, last_used_time=self._clock())
                self._touched.add(adapter_id)

    def blob(self, version: str) -> Path:
        """The version's folder: the safetensors file, the config as uploaded, caches."""
        self._blobs.require(version)
        return self._blobs.folder(version)

    @property
    def temporary(self) -> Path:
        """A folder on the store's file system, swept when the store is opened."""
        return self._temporary

    def retain(self, version: str) -> None:
        """Keep the version's files until `release`, even when its last name is deleted."""
        self._blobs.retain(version)

    def release(self, version: str) -> None:
        self._blobs.release(version)

    def verify(self, version: str) -> None:
        """Hash the files once in this process; ADAPTER_UNUSABLE and quarantine if one differs.

        A cache that differs is dropped instead: it can be made again.
        """
        self._blobs.verify(version)

    def add_file(self, version: str, name: str, source: Path) -> None:
        """Move a cache into the version's folder; `source` is on the store's file system."""
        with storage_errors():
            self._blobs.add_file(version, name, source)

    def close(self) -> None:
        """Write down when adapters were last used, and let another server have the store."""
        with self._lock:
            lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is None:
            return
        try:
            with self._blobs.exclusive():
                for adapter_id in sorted(self._touched):
                    record = self._records[adapter_id]
                    self._blobs.write(self._manifest(adapter_id), manifest_bytes(record))
        except OSError as error:
            logger.warning("adapter store: last use is not written down: %s", error)
        finally:
            self._blobs.close()
            os.close(lock_fd)

    def _check_size(self, total_size: int) -> None:
        if total_size < 1:
            raise InvalidRequestError("header.total_size", "must be at least 1")
        if total_size > self._max_adapter_bytes:
            raise RequestError(
                "ADAPTER_TOO_LARGE",
                f"{total_size} bytes are over this server's {self._max_adapter_bytes}",
                field="header.total_size",
            )
        with storage_errors():
            free = self._disk.free_bytes(self._root)
        if free < total_size:
            raise RequestError("DISK_FULL", "the adapter store has no room for the upload")

    def _forget(self, upload: Upload) -> None:
        with self._lock:
            if self._uploads.get(upload.adapter_id) is upload:
                del self._uploads[upload.adapter_id]

    def _has(self, adapter_id: str, version: str) -> AdapterRecord | None:
        """What the name has of this very version; ADAPTER_EXISTS when it has another."""
        with self._lock:
            record = self._records.get(adapter_id)
        if record is not None and record.version != version:
            raise RequestError(
                "ADAPTER_EXISTS", f"{adapter_id} holds other content; delete it or use another name"
            )
        return record

    def _stage(
        self, upload: Upload, spec: AdapterSpec, weights: FileRecord, extras: Mapping[str, Path]
    ) -> tuple[Path, dict[str, FileRecord]]:
        """A whole blob in the upload's folder, on disk."""
        staged = upload.folder / "blob"
        self._disk.make_folder(staged)
        self._disk.move(upload.path, staged / WEIGHTS_NAME)
        self._disk.write(staged / CONFIG_NAME, spec.uploaded_config_json.encode())
        files = {WEIGHTS_NAME: weights, CONFIG_NAME: describe(staged / CONFIG_NAME)}
        for name, source in extras.items():
            self._disk.sync(source)
            files[name] = describe(source)
            self._disk.move(source, staged / name)
        self._disk.write(staged / RECORD_NAME, files_bytes(files))
        self._disk.sync(staged)
        return staged, files

    def _new_record(
        self, upload: Upload, version: str, spec: AdapterSpec, visibility: Visibility
    ) -> AdapterRecord:
        return AdapterRecord(
            adapter_id=upload.adapter_id,
            version=version,
            etag=secrets.token_hex(16),
            size_bytes=upload.total_size,
            rank=spec.rank,
            target_modules=spec.target_modules,
            state=AdapterState.READY,
            visibility=visibility,
            create_time=self._clock(),
            last_used_time=None,
            owner=TENANT,
            base_id=self._base_id,
        )

    def _name(self, record: AdapterRecord) -> None:
        """From here on the adapter exists: on disk first, then for everybody."""
        manifest = self._manifest(record.adapter_id)
        try:
            self._blobs.write(manifest, manifest_bytes(record))
        except OSError:
            try:
                self._disk.remove(manifest)
            except OSError:  # a restart may find the name, and then needs its content
                self._blobs.link(record.version, record.adapter_id)
            raise
        self._blobs.link(record.version, record.adapter_id)
        with self._lock:
            self._records[record.adapter_id] = record
            insort(self._ids, record.adapter_id)

    def _judged(self, record: AdapterRecord) -> AdapterRecord:
        """The record with the state it has now."""
        if self._blobs.is_damaged(record.version):
            return replace(record, state=AdapterState.QUARANTINED)
        if record.base_id != self._base_id:
            return replace(record, state=AdapterState.INCOMPATIBLE)
        return record

    def _recover(self) -> None:
        with contextlib.suppress(PermissionError):  # a parent that only lets us through
            self._disk.sync(self._root.parent)
        for name in ("blobs/sha256", f"manifests/{TENANT}", f"uploads/{TENANT}"):
            self._disk.make_folder((self._root / name).parent)
            self._disk.make_folder(self._root / name)
        for left in self._temporary.iterdir():
            if left.is_dir():
                self._disk.remove_folder(left)
            else:
                left.unlink()
        readable = [self._read_name(path) for path in self._manifests.glob("*.json")]
        self._ids = sorted(self._records)
        # A manifest that cannot be read may stand for any of the blobs.
        if all(readable):
            self._blobs.sweep()

    def _read_name(self, path: Path) -> bool:
        adapter_id = path.name.removesuffix(".json")
        if not is_adapter_id(adapter_id):
            logger.error("adapter store: %s is not a manifest of this server's", path)
            return False
        record = parse_manifest(path.read_bytes(), adapter_id)
        if record is None:
            logger.error("adapter store: the manifest %s cannot be read", path)
            self._records[adapter_id] = unreadable_record(adapter_id)
            return False
        self._blobs.load(record.version, adapter_id)
        self._records[adapter_id] = record
        return True

    def _manifest(self, adapter_id: str) -> Path:
        return self._manifests / f"{adapter_id}.json"


def _take_lock(root: Path) -> int:
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartupError(f"adapter store {root} is in use by another server") from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _token(adapter_id: str) -> str:
    return base64.urlsafe_b64encode(adapter_id.encode()).decode()


def _read_token(page_token: str) -> str:
    try:
        adapter_id = base64.urlsafe_b64decode(page_token.encode("ascii")).decode("ascii")
    except ValueError:  # of either codec
        adapter_id = ""
    if not is_adapter_id(adapter_id) or _token(adapter_id) != page_token:
        raise InvalidRequestError("page_token", "is not a token that ListAdapters gave")
    return adapter_id
