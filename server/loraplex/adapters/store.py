"""Adapters on disk: immutable content under its version, names that point at it, uploads under way.

    lock                                held while a server has the store
    blobs/sha256/aa/<version>/          adapter_model.safetensors, adapter_config.json, record.json
    manifests/<tenant>/<name>.json      written last: with it the adapter exists
    uploads/<tenant>/...                temporary, swept when the store is opened

A crash at any moment leaves a name with all of its content, or no name.
"""

import base64
import binascii
import contextlib
import fcntl
import logging
import os
import secrets
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

from loraplex.adapters.peft import CONFIG_NAME, AdapterSpec
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_files import Disk, FileRecord, Upload, describe, storage_errors
from loraplex.adapters.store_records import (
    AdapterRecord,
    AdapterState,
    Blob,
    Visibility,
    files_bytes,
    is_adapter_id,
    is_digest,
    manifest_bytes,
    parse_files,
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
_RECORD_NAME = "record.json"
_QUARANTINE_NAME = "quarantined"  # an empty file: the damage outlives the process that found it
_TRUTH = (WEIGHTS_NAME, CONFIG_NAME)  # a blob's other files are caches, dropped when they differ


class AdapterStore:
    """The durable store of one server; made by `open`.

    `_lock` guards what is in memory and is held for moments only, so the event loop may call `get`,
    `list`, `touch`, `retain`. `_disk_lock` orders what changes names and blobs; whoever takes it
    waits for the disk.
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
        self._blob_root = root / "blobs" / "sha256"
        self._manifest_root = root / "manifests" / TENANT
        self._upload_root = root / "uploads" / TENANT
        self._lock = Lock()
        self._disk_lock = Lock()

        self._lock_fd: int | None = lock_fd  # None once closed
        self._records: dict[str, AdapterRecord] = {}
        self._ids: list[str] = []  # the records' keys, sorted
        self._blobs: dict[str, Blob] = {}
        self._garbage: set[str] = set()  # versions to remove, unless they are in use again
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
            lock_fd = _take_lock(root)
        except OSError as error:
            raise StartupError(f"adapter store {root}: {error.strerror}") from error
        store = cls(root, base_id, max_adapter_bytes, disk or Disk(), clock, lock_fd)
        try:
            store._recover()
        except BaseException as error:
            os.close(lock_fd)
            if isinstance(error, OSError):
                raise StartupError(f"adapter store {root}: {error.strerror}") from error
            raise
        return store

    def begin(self, adapter_id: str, total_size: int) -> Upload:
        """Room for one upload to `adapter_id`, which no other upload may use until it ends."""
        validate_adapter_id(adapter_id, "header.adapter_id")
        self._check_size(total_size)
        folder = self._temporary()
        upload = Upload(self._disk, folder, adapter_id, total_size, self._forget)
        with self._lock:
            self._check_open()
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
        visibility: Visibility,
        extra_files: Mapping[str, Path] | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Give a finished upload its name; durable when this returns. False: it had it already.

        `sha256` is what `upload.finish` answered. `extra_files` are caches that belong to the
        version, moved from where they lie (best in `upload.folder`).
        """
        assert upload.adapter_id == adapter_id
        assert is_digest(version)
        with storage_errors():
            record = self._same(adapter_id, version)
            if record is None or record.state is not AdapterState.READY:
                weights = FileRecord(upload.total_size, sha256)
                staged, files = self._stage(upload, spec, weights, extra_files or {})
                with self._exclusive():
                    record = self._same(adapter_id, version)
                    self._place(version, staged, files)
                    if record is None:
                        fresh = self._record_of(adapter_id, version, spec, weights.size, visibility)
                        self._name(fresh)
                        upload.discard()
                        return fresh, True
                    record = self._records[adapter_id]
        upload.discard()
        return record, False

    def get(self, adapter_id: str) -> AdapterRecord:
        with self._lock:
            record = self._records.get(adapter_id)
        if record is None:
            raise RequestError("ADAPTER_NOT_FOUND", f"there is no adapter {adapter_id!r}")
        return record

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
            records = tuple(self._records[adapter_id] for adapter_id in ids)
        return records, _token(ids[-1]) if more else ""

    def delete(self, adapter_id: str) -> None:
        """Take the name away at once; its content goes when nobody holds it any more."""
        with storage_errors(), self._exclusive():
            record = self.get(adapter_id)
            manifest = self._manifest(adapter_id)
            manifest.unlink(missing_ok=True)
            with self._lock:
                del self._records[adapter_id]
                self._ids.remove(adapter_id)
                self._touched.discard(adapter_id)
                if blob := self._blobs.get(record.version):
                    blob.names.discard(adapter_id)
                    self._garbage.add(record.version)
            self._disk.sync(manifest.parent)

    def touch(self, adapter_id: str) -> None:
        """The adapter is used now; written down when the store is closed."""
        with self._lock:
            if record := self._records.get(adapter_id):
                self._records[adapter_id] = replace(record, last_used_time=self._clock())
                self._touched.add(adapter_id)

    def blob(self, version: str) -> Path:
        """The version's folder: the safetensors file, the config as uploaded, caches."""
        with self._lock:
            self._known(version)
        return self._folder(version)

    def retain(self, version: str) -> None:
        """Keep the version's files until `release`, even when its last name is deleted."""
        with self._lock:
            self._known(version).readers += 1

    def release(self, version: str) -> None:
        with self._lock:
            blob = self._blobs[version]
            assert blob.readers > 0
            blob.readers -= 1
            if not blob.readers and not blob.names:
                self._garbage.add(version)
        self._collect()

    def verify(self, version: str) -> None:
        """Hash the files once in this process; ADAPTER_UNUSABLE and quarantine if one differs.

        A cache that differs is dropped instead: it can be made again.
        """
        with self._lock:
            blob = self._known(version)
            blob.readers += 1
        try:
            with blob.checking:
                if not blob.verified and not blob.damaged:
                    self._check_files(version, blob)
                if blob.damaged:
                    raise _unusable(version)
        finally:
            self.release(version)

    def add_file(self, version: str, name: str, source: Path) -> None:
        """Move a cache into the version's folder; `source` is on the store's file system."""
        assert name not in (*_TRUTH, _RECORD_NAME, _QUARANTINE_NAME)
        with storage_errors():
            self._disk.sync(source)
            file = describe(source)
            with self._exclusive():
                self._add(version, name, source, file)

    def close(self) -> None:
        """Write down when adapters were last used, and let another server have the store."""
        with self._lock:
            touched = [self._records[adapter_id] for adapter_id in sorted(self._touched)]
            self._touched.clear()
        with self._disk_lock:
            if self._lock_fd is None:
                return
            try:
                for record in touched:
                    if record.version:
                        self._write_manifest(record)
            except OSError as error:
                logger.warning("adapter store: last use is not written down: %s", error)
            finally:
                os.close(self._lock_fd)
                self._lock_fd = None

    def _check_open(self) -> None:
        if self._lock_fd is None:
            raise RequestError("STORE_UNAVAILABLE", "the adapter store is closed")

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

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Alone with the disk; what became garbage meanwhile is removed afterwards."""
        try:
            with self._disk_lock:
                self._check_open()
                yield
        finally:
            self._collect()

    def _collect(self) -> None:
        """Remove garbage, unless somebody has the disk, who will do it when done."""
        while self._garbage and self._disk_lock.acquire(blocking=False):
            try:
                if self._lock_fd is None:
                    return
                with self._lock:
                    doomed = [version for version in self._garbage if self._is_unused(version)]
                    self._garbage.clear()
                    for version in doomed:
                        del self._blobs[version]
                for version in doomed:
                    self._disk.remove_folder(self._folder(version))
            finally:
                self._disk_lock.release()

    def _is_unused(self, version: str) -> bool:
        blob = self._blobs.get(version)
        return blob is not None and not blob.names and not blob.readers

    def _forget(self, upload: Upload) -> None:
        with self._lock:
            if self._uploads.get(upload.adapter_id) is upload:
                del self._uploads[upload.adapter_id]

    def _known(self, version: str) -> Blob:
        blob = self._blobs.get(version)
        if blob is None:
            raise RequestError("ADAPTER_NOT_FOUND", f"there is no adapter of version {version}")
        return blob

    def _same(self, adapter_id: str, version: str) -> AdapterRecord | None:
        """The name's record when it has this very version, None when the name is free."""
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
        self._disk.write(staged / _RECORD_NAME, files_bytes(files))
        self._disk.sync(staged)
        return staged, files

    def _place(self, version: str, staged: Path, files: dict[str, FileRecord]) -> None:
        """The staged blob becomes the version's, unless that has a sound one already."""
        with self._lock:
            blob = self._blobs.get(version)
        if blob is not None and not blob.damaged:
            for name in files.keys() - blob.files.keys():
                self._add(version, name, staged / name, files[name])
            return
        target = self._folder(version)
        self._disk.make_folder(target.parent)
        if target.exists():
            trash = self._temporary()
            target.replace(trash)
            self._disk.remove_folder(trash)
        self._disk.move(staged, target)
        with self._lock:
            if blob is None:
                self._blobs[version] = Blob(files)
                self._garbage.add(version)
            else:
                blob.files, blob.damaged, blob.verified = files, False, False
                self._refresh(blob)

    def _add(self, version: str, name: str, source: Path, file: FileRecord) -> None:
        with self._lock:
            blob = self._known(version)
        self._disk.move(source, self._folder(version) / name)
        self._keep_record(version, blob, {**blob.files, name: file})

    def _keep_record(self, version: str, blob: Blob, files: dict[str, FileRecord]) -> None:
        self._write(self._folder(version) / _RECORD_NAME, files_bytes(files))
        with self._lock:
            blob.files = files

    def _record_of(
        self, adapter_id: str, version: str, spec: AdapterSpec, size: int, visibility: Visibility
    ) -> AdapterRecord:
        return AdapterRecord(
            adapter_id=adapter_id,
            version=version,
            etag=secrets.token_hex(16),
            size_bytes=size,
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
            self._write(manifest, manifest_bytes(record))
        except OSError:
            with contextlib.suppress(OSError):
                manifest.unlink(missing_ok=True)
            raise
        with self._lock:
            self._records[record.adapter_id] = record
            insort(self._ids, record.adapter_id)
            self._blobs[record.version].names.add(record.adapter_id)

    def _write(self, path: Path, data: bytes) -> None:
        """The file has this content, or still what it had."""
        temporary = self._temporary()
        try:
            self._disk.write(temporary, data)
            self._disk.move(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def _check_files(self, version: str, blob: Blob) -> None:
        for name, expected in dict(blob.files).items():
            path = self._folder(version) / name
            with storage_errors():
                if path.is_file() and describe(path) == expected:
                    continue
            if name in _TRUTH:
                self._quarantine(version, blob)
                return
            logger.warning("adapter store: %s of %s differs and is dropped", name, version)
            with storage_errors(), self._exclusive():
                self._disk.remove(path)
                self._keep_record(version, blob, {k: v for k, v in blob.files.items() if k != name})
        with self._lock:
            blob.verified = True

    def _quarantine(self, version: str, blob: Blob) -> None:
        logger.error("adapter store: the bytes of %s differ from what was uploaded", version)
        with self._lock:
            blob.damaged = True
            self._refresh(blob)
        try:
            self._write(self._folder(version) / _QUARANTINE_NAME, b"")
        except OSError as error:
            logger.warning("adapter store: the quarantine is not written down: %s", error)

    def _refresh(self, blob: Blob) -> None:
        for adapter_id in blob.names:
            record = self._records[adapter_id]
            self._records[adapter_id] = replace(record, state=self._state(record, blob))

    def _state(self, record: AdapterRecord, blob: Blob) -> AdapterState:
        if blob.damaged:
            return AdapterState.QUARANTINED
        if record.base_id != self._base_id:
            return AdapterState.INCOMPATIBLE
        return AdapterState.READY

    def _recover(self) -> None:
        for folder in (self._blob_root, self._manifest_root, self._upload_root):
            self._disk.make_folder(folder.parent)
            self._disk.make_folder(folder)
        for left in self._upload_root.iterdir():
            if left.is_dir():
                self._disk.remove_folder(left)
            else:
                left.unlink()
        readable = [self._read_name(path) for path in self._manifest_root.glob("*.json")]
        self._ids = sorted(self._records)
        # A manifest that cannot be read may stand for any of the blobs.
        if all(readable):
            for path in self._blob_root.glob("*/*"):
                if path.name not in self._blobs and is_digest(path.name):
                    self._disk.remove_folder(path)

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
        blob = self._blobs.setdefault(record.version, self._read_blob(record.version))
        blob.names.add(adapter_id)
        self._records[adapter_id] = replace(record, state=self._state(record, blob))
        return True

    def _read_blob(self, version: str) -> Blob:
        folder = self._folder(version)
        record = folder / _RECORD_NAME
        files = (parse_files(record.read_bytes()) if record.is_file() else None) or {}
        sound = {
            name: file
            for name, file in files.items()
            if (folder / name).is_file() and (folder / name).stat().st_size == file.size
        }
        marked = (folder / _QUARANTINE_NAME).exists()
        return Blob(sound, damaged=marked or not all(name in sound for name in _TRUTH))

    def _folder(self, version: str) -> Path:
        return self._blob_root / version[:2] / version

    def _manifest(self, adapter_id: str) -> Path:
        return self._manifest_root / f"{adapter_id}.json"

    def _temporary(self) -> Path:
        """A name in the temporary area that nothing has yet."""
        return self._upload_root / secrets.token_hex(16)


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


def _unusable(version: str) -> RequestError:
    return RequestError(
        "ADAPTER_UNUSABLE",
        f"version {version} is quarantined: its bytes on disk differ from what was uploaded",
    )


def _token(adapter_id: str) -> str:
    return base64.urlsafe_b64encode(adapter_id.encode()).decode()


def _read_token(page_token: str) -> str:
    try:
        adapter_id = base64.urlsafe_b64decode(page_token.encode("ascii")).decode("ascii")
    except (ValueError, binascii.Error):
        adapter_id = ""
    if not is_adapter_id(adapter_id) or _token(adapter_id) != page_token:
        raise InvalidRequestError("page_token", "is not a token that ListAdapters gave")
    return adapter_id
