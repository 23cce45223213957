"""Every upload by its upload_id: who may begin one, go on with it or take over; when it is over."""

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_files import Disk, storage_errors, sweep
from loraplex.adapters.store_records import Partial, UploadRequest, is_upload_id, parse_partial
from loraplex.adapters.store_upload import (
    NOTE_NAME,
    Upload,
    offset_mismatch,
    restore,
    size_of,
    tidy,
)
from loraplex.errors import InvalidRequestError, RequestError

logger = logging.getLogger(__name__)


class UploadBook:
    """Every upload by its upload_id: those with a stream, those without, and those published.

    A lock of an upload may be held while taking `_lock`, never the other way round.
    """

    def __init__(self, root: Path, disk: Disk, clock: Callable[[], float], ttl: float) -> None:
        self._root = root
        self._disk = disk
        self._clock = clock
        self._ttl = ttl  # seconds
        self._changing = Lock()  # held while uploads begin or expire; they end at any time
        self._lock = Lock()  # guards what follows, for moments only

        self._open = True
        self._live: dict[str, Upload] = {}  # those that a stream has
        self._partials: dict[str, Partial] = {}  # the others

    def recover(self) -> None:
        """Read what uploads a crash or a stop left, and sweep the rest."""
        for folder in self._root.iterdir():
            try:
                partial = self._read(folder)
            except OSError as error:
                logger.warning("adapter store: an upload cannot be gone on with: %s", error)
                continue
            if partial is not None:
                self._partials[folder.name] = partial
            else:
                sweep(self._disk, folder)

    def begin(self, request: UploadRequest) -> Upload:
        """A new upload, or the next stream of one that is known."""
        with self._changing, storage_errors():
            if not self._open:
                raise RequestError("STORE_UNAVAILABLE", "the adapter store is closed")
            self._drop_expired()
            self._check_alone(request)
            known = self._take_over(request)
            committed = known.committed_size if known else 0
            if request.resume_offset != committed:
                raise offset_mismatch("header.resume_offset", request.resume_offset, committed)
            self._check_space(request.total_size - committed)
            folder = self._root / request.upload_id
            upload = Upload(self._disk, folder, request, known, self._clock, self._ended)
            with self._lock:
                self._live[request.upload_id] = upload
        upload.open()
        return upload

    def find(self, upload_id: str) -> tuple[Partial, float]:
        """What is on disk of it, and when that expires; UPLOAD_NOT_FOUND."""
        with self._lock:
            if live := self._live.get(upload_id):
                return live.partial, self._clock() + self._ttl
            partial = self._partials.get(upload_id)
        if partial is None or self._is_over(partial):
            raise RequestError("UPLOAD_NOT_FOUND", f"there is no upload {upload_id}")
        return partial, partial.time + self._ttl

    def forget(self, request: UploadRequest) -> None:
        """Drop what is kept of this very upload, unless a stream has it or it was published."""
        upload_id = request.upload_id
        with self._changing:
            with self._lock:
                partial = self._partials.get(upload_id)
                if not self._open or upload_id in self._live:
                    return
                if partial is None or partial.version is not None:
                    return
                if _difference(partial.request, request) is not None:
                    return
                del self._partials[upload_id]
            self._disk.remove_folder(self._root / upload_id)

    def expire(self) -> None:
        with self._changing:
            if self._open:
                self._drop_expired()

    def close(self) -> None:
        """Suspend what still has a stream; nothing begins from here on."""
        with self._changing:
            self._open = False
        with self._lock:
            live = list(self._live.values())
        for upload in live:
            if not upload.is_finished:
                upload.suspend()

    def _ended(self, upload: Upload, left: Partial | None) -> None:
        upload_id = upload.request.upload_id
        with self._lock:
            if self._live.get(upload_id) is upload:
                del self._live[upload_id]
                self._partials.pop(upload_id, None)
                if left is not None:
                    self._partials[upload_id] = left

    def _check_alone(self, request: UploadRequest) -> None:
        with self._lock:
            others = [live.request for live in self._live.values()]
        for other in others:
            if other.adapter_id == request.adapter_id and other.upload_id != request.upload_id:
                raise RequestError(
                    "UPLOAD_IN_PROGRESS", f"another upload to {request.adapter_id} is under way"
                )

    def _take_over(self, request: UploadRequest) -> Partial | None:
        """What the upload may go on from, which no stream has any more."""
        with self._lock:
            live = self._live.get(request.upload_id)
        if live is not None:
            _check_same(live.request, request)
            live.take_over()
        with self._lock:
            partial = self._partials.get(request.upload_id)
        if partial is None or partial.version is not None:
            return None  # what is published can be uploaded again, after its name went
        _check_same(partial.request, request)
        return partial

    def _check_space(self, wanted: int) -> None:
        """Room for it beside what the uploads with a stream are still to write."""
        with self._lock:
            live = list(self._live.values())
        reserved = sum(upload.request.total_size - upload.committed_size for upload in live)
        if self._disk.free_bytes(self._root) - reserved < wanted:
            raise RequestError("DISK_FULL", "the adapter store has no room for the upload")

    def _is_over(self, partial: Partial) -> bool:
        return self._clock() >= partial.time + self._ttl

    def _drop_expired(self) -> None:
        with self._lock:
            expired = [name for name, left in self._partials.items() if self._is_over(left)]
            expired = [name for name in expired if name not in self._live]
            for upload_id in expired:
                del self._partials[upload_id]
        for upload_id in expired:
            self._disk.remove_folder(self._root / upload_id)

    def _read(self, folder: Path) -> Partial | None:
        """What can be gone on with, or is remembered."""
        path = folder / NOTE_NAME
        if not is_upload_id(folder.name) or not path.is_file():
            return None
        partial = parse_partial(path.read_bytes(), folder.name)
        if partial is None or self._is_over(partial):
            return None
        if partial.version is not None:
            tidy(self._disk, folder, keep=(NOTE_NAME,))
            return partial
        restore(self._disk, folder)
        return partial if size_of(folder / WEIGHTS_NAME) >= partial.committed_size else None


def _check_same(known: UploadRequest, request: UploadRequest) -> None:
    field = _difference(known, request)
    if field is not None:
        raise InvalidRequestError(f"header.{field}", "is not what this upload_id was begun with")


def _difference(known: UploadRequest, request: UploadRequest) -> str | None:
    """The first of the header's fields that makes it another upload."""
    for name, field in (
        ("adapter_id", "adapter_id"),
        ("total_size", "total_size"),
        ("sha256", "sha256"),
        ("config_json", "adapter_config_json"),
    ):
        if getattr(known, name) != getattr(request, name):
            return field
    return None
