"""Adapters on disk: immutable content under its version, names that point at it, uploads under way.

    lock                                held while a server has the store
    blobs/sha256/aa/<version>/          adapter_model.safetensors, adapter_config.json, record.json
    manifests/<tenant>/<name>.json      written last: with it the adapter exists
    last_used/<tenant>.json             written now and then
    uploads/<tenant>/<upload_id>/       uploads that are under way, or were published lately
    tmp/                                swept when the store is opened

A crash at any moment leaves a name with all of its content, as it was or as it was to be, or no
name.
"""

import base64
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from loraplex.adapters.peft import CONFIG_NAME, AdapterSpec
from loraplex.adapters.store_blobs import BlobStore
from loraplex.adapters.store_files import Disk, storage_errors, sweep
from loraplex.adapters.store_names import NameBook
from loraplex.adapters.store_records import (
    AdapterRecord,
    AdapterState,
    UploadRequest,
    UploadStatus,
    Visibility,
    is_adapter_id,
    is_digest,
    is_upload_id,
    require_rank,
    require_ready,
    state_under,
    validate_adapter_id,
)
from loraplex.adapters.store_upload import Upload
from loraplex.adapters.store_uploads import UploadBook
from loraplex.errors import InvalidRequestError, RequestError, StartupError

__all__ = [
    "AdapterRecord",
    "AdapterState",
    "AdapterStore",
    "Published",
    "Upload",
    "UploadRequest",
    "UploadStatus",
    "Visibility",
    "is_digest",
    "require_rank",
    "require_ready",
    "state_under",
    "validate_adapter_id",
]

logger = logging.getLogger(__name__)

TENANT = "default"
DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1_000
UPLOAD_TTL_SECONDS = 3600.0


class Published(NamedTuple):
    """What became of an upload."""

    record: AdapterRecord
    created: bool  # False: the name had this version already
    repaired: bool  # its bytes took the place of damaged ones


class AdapterStore:
    """The durable store of one server; made by `open`.

    `get`, `acquire`, `release`, `references`, `list`, `pinned`, `upload_status`, `blob` and `cache`
    only look at memory and may be called from the event loop; the other methods wait for the disk.
    """

    def __init__(
        self,
        root: Path,
        base_id: str,
        max_adapter_bytes: int,
        disk: Disk,
        clock: Callable[[], float],
        upload_ttl: float,
        on_removed: Callable[[str], None],
        lock_fd: int,
    ) -> None:
        self._root = root
        self._base_id = base_id
        self._max_adapter_bytes = max_adapter_bytes
        self._disk = disk
        self._clock = clock
        self._temporary = root / "tmp"
        self._blobs = BlobStore(root / "blobs" / "sha256", self._temporary, disk, on_removed)
        manifests, last_used = root / "manifests" / TENANT, root / "last_used" / f"{TENANT}.json"
        self._names = NameBook(manifests, last_used, self._blobs, disk, base_id)
        self._uploads = UploadBook(root / "uploads" / TENANT, disk, clock, upload_ttl)

        self._lock = Lock()  # guards what follows
        self._lock_fd: int | None = lock_fd  # None once closed

    @classmethod
    def open(
        cls,
        root: Path,
        base_id: str,
        max_adapter_bytes: int,
        *,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
        upload_ttl: float = UPLOAD_TTL_SECONDS,
        on_removed: Callable[[str], None] | None = None,
    ) -> "AdapterStore":
        """Lock the store, sweep what a crash left, and read every name.

        Uploads are forgotten `upload_ttl` seconds after their last write, or their publication.
        `on_removed` is told a version just before its files go, in whatever thread removes them.
        """
        disk = disk or Disk()
        options = (disk, clock, upload_ttl, on_removed or _ignore)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as on_failure:
                lock_fd = disk.lock(root / "lock")
                on_failure.callback(os.close, lock_fd)
                store = cls(root, base_id, max_adapter_bytes, *options, lock_fd)
                store._recover()
                on_failure.pop_all()
        except BlockingIOError:
            raise StartupError(
                f"adapter store {root} is in use by another server (--store takes another)"
            ) from None
        except OSError as error:
            where = error.filename or root  # inside: what is missing cannot be made there
            raise StartupError(f"adapter store {root}: {where}: {error.strerror}") from error
        return store

    def begin(self, request: UploadRequest) -> Upload:
        """Start an upload, or go on with one that came as far as `resume_offset`.

        The same upload_id takes over from the stream that has it. Refused are names that may not be
        flipped, names that another upload streams to, and what the disk has no room for beside
        what running uploads are still to bring.
        """
        validate_adapter_id(request.adapter_id, "header.adapter_id")
        if not is_upload_id(request.upload_id):
            raise InvalidRequestError("header.upload_id", "must be a UUID in lower case")
        self._check_size(request.total_size)
        self._names.check_header(request)
        return self._uploads.begin(request)

    def publish(
        self,
        upload: Upload,
        version: str,
        spec: AdapterSpec,
        sha256: str,
        extra_files: Mapping[str, Path] | None = None,
    ) -> Published:
        """Give a finished upload its name; durable when this returns.

        `sha256` is what `upload.finish` answered. `extra_files` are caches that belong to the
        version, moved from where they lie (best in `upload.folder`). The upload is over when this
        returns; when it raises, `upload.suspend` or `upload.discard` is the caller's.
        """
        assert is_digest(version)
        request = upload.request
        with storage_errors():
            record = self._names.holding(request, version)
            created = repaired = False
            # The bytes that came are let go only for others that were looked at.
            if not self._blobs.is_sound(version) or record is None:
                config = (CONFIG_NAME, spec.uploaded_config_json.encode())
                staged, files = upload.stage(sha256, config, extra_files or {})
                with self._blobs.exclusive():
                    record = self._names.holding(request, version)
                    created = record is None
                    repaired = self._blobs.place(version, staged, files)
                    if record is None:
                        record = self._new_record(request, version, spec)
                        self._names.commit(request.adapter_id, record)
        upload.published(version)
        return Published(self._names.judged(record), created, repaired)

    def upload_status(self, upload_id: str) -> UploadStatus:
        """How far an upload came; UPLOAD_NOT_FOUND when it is unknown or has expired.

        A published one is known while its name has what was published.
        """
        partial, expire_time = self._uploads.find(upload_id)
        if partial.version is None:
            return UploadStatus(partial.committed_size, expire_time, None)
        record = self._names.find(partial.request.adapter_id)
        if record is None or record.version != partial.version:
            raise RequestError("UPLOAD_NOT_FOUND", f"there is no upload {upload_id}")
        return UploadStatus(partial.committed_size, expire_time, record)

    def clear_upload(self, request: UploadRequest) -> None:
        """Drop what is kept of this very upload, which nobody needs, unless a stream has it."""
        self._uploads.forget(request)

    def get(self, adapter_id: str) -> AdapterRecord:
        return self._names.get(adapter_id)

    def acquire(self, adapter_id: str) -> AdapterRecord:
        """The name's version now, kept with its files until `release`; ADAPTER_UNUSABLE."""
        return self._names.acquire(adapter_id, self._clock())

    def release(self, version: str) -> None:
        """The files of a version that nobody needs any more go in a thread of the store's own."""
        self._blobs.release(version)

    def references(self, version: str) -> int:
        """How many have acquired it and not released it."""
        return self._blobs.references(version)

    def list(self, page_size: int, page_token: str) -> tuple[tuple[AdapterRecord, ...], str]:
        """Records by adapter_id, and the token of the next page ("": this was the last)."""
        if page_size < 0:
            raise InvalidRequestError("page_size", "must not be negative")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        records, more = self._names.page(size, _read_token(page_token) if page_token else "")
        return records, _token(records[-1].adapter_id) if more else ""

    def pinned(self) -> tuple[AdapterRecord, ...]:
        """The names that are pinned, oldest first."""
        return self._names.pinned()

    def set_pinned(self, adapter_id: str, pinned: bool) -> AdapterRecord:
        """A pin belongs to the name, and follows it from version to version."""
        with storage_errors(), self._blobs.exclusive():
            record = self._names.get(adapter_id)
            if record.pinned != pinned:
                if pinned:
                    require_ready(record)
                self._names.commit(adapter_id, replace(record, pinned=pinned))
        return self._names.get(adapter_id)

    def delete(self, adapter_id: str) -> None:
        """Take the name away; its content goes when nobody holds it any more."""
        with storage_errors(), self._blobs.exclusive():
            self._names.get(adapter_id)
            self._names.commit(adapter_id, None)

    def blob(self, version: str) -> Path:
        """The version's folder: the safetensors file, the config as uploaded, caches."""
        self._blobs.require(version)
        return self._blobs.folder(version)

    def cache(self, version: str, name: str) -> Path | None:
        """The version's cache of that name, if it is the one that was added; see `verify`."""
        return self._blobs.cache(version, name)

    @property
    def temporary(self) -> Path:
        """A folder on the store's file system, swept when the store is opened."""
        return self._temporary

    def verify(self, version: str) -> None:
        """Hash the files once in this process; ADAPTER_UNUSABLE and quarantine if one differs.

        A cache that differs is dropped instead: it can be made again.
        """
        self._blobs.verify(version)

    def is_sound(self, version: str) -> bool:
        """Whether the version is here and passes `verify`."""
        return self._blobs.is_sound(version)

    def add_file(self, version: str, name: str, source: Path) -> None:
        """Move a cache into the version's folder; `source` is on the store's file system."""
        with storage_errors():
            self._blobs.add_file(version, name, source)

    def versions(self) -> tuple[str, ...]:
        """Whatever has files here, in a fixed order."""
        return self._blobs.versions()

    def scrub(self, version: str, on_bytes: Callable[[int], object]) -> None:
        """Hash the files again, calling `on_bytes` with the size of every piece; as `verify`."""
        self._blobs.scrub(version, on_bytes)

    def sweep(self) -> None:
        """What is to be done every minute or so: expired uploads, last uses, a disk in doubt."""
        self._uploads.expire()
        with storage_errors(), self._blobs.exclusive():
            self._names.settle()
            self._names.write_last_used()

    def close(self) -> None:
        """Suspend what is under way, and let another server have the store."""
        with self._lock:
            lock_fd, self._lock_fd = self._lock_fd, None
        if lock_fd is None:
            return
        try:
            self._uploads.close()
            self.sweep()
        except RequestError as error:
            logger.warning("adapter store: last uses are not written down: %s", error)
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

    def _new_record(self, request: UploadRequest, version: str, spec: AdapterSpec) -> AdapterRecord:
        before = self._names.find(request.adapter_id)
        return AdapterRecord(
            adapter_id=request.adapter_id,
            version=version,
            etag=secrets.token_hex(16),
            size_bytes=request.total_size,
            rank=spec.rank,
            target_modules=spec.target_modules,
            state=AdapterState.READY,
            visibility=Visibility.PRIVATE,
            create_time=self._clock(),
            last_used_time=before.last_used_time if before else None,
            owner=TENANT,
            base_id=self._base_id,
            pinned=before is not None and before.pinned,
            use_dora=spec.use_dora,
            invocation_tokens=spec.invocation_tokens,
        )

    def _recover(self) -> None:
        with contextlib.suppress(PermissionError):  # a parent that only lets us through
            self._disk.sync(self._root.parent)
        for name in "blobs/sha256", f"manifests/{TENANT}", f"uploads/{TENANT}":
            self._disk.make_folder((self._root / name).parent)
            self._disk.make_folder(self._root / name)
        for name in "last_used", "tmp":
            self._disk.make_folder(self._root / name)
        for left in self._temporary.iterdir():
            sweep(self._disk, left)
        self._uploads.recover()
        # A manifest that cannot be read may stand for any of the blobs.
        if self._names.load():
            self._blobs.sweep()


def _ignore(version: str) -> None:
    """Nobody asked to be told."""


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
