"""One upload under way: bytes that arrive in order, and survive the stream and the server.

    uploads/<tenant>/<upload_id>/
        adapter_model.safetensors    what has come so far
        upload.json                  how much of it is safely on disk, or what became of it
        blob/                        while it is being published

What was written since upload.json last told of it may be lost in a crash, and is cut off then.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import RLock

from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_blobs import RECORD_NAME
from loraplex.adapters.store_files import Disk, FileRecord, describe, storage_errors, sweep
from loraplex.adapters.store_records import Partial, UploadRequest, files_bytes, partial_bytes
from loraplex.errors import InvalidRequestError, RequestError

logger = logging.getLogger(__name__)

NOTE_NAME = "upload.json"
NOTE_BYTES = 8 << 20  # a crash costs a client at most these
_STAGED_NAME = "blob"
_READ_BYTES = 1 << 20


class Upload:
    """One stream's hold on an upload; when it has ended, its methods refuse or do nothing.

    They may run in different threads, even `discard` beside a `write` of a cancelled call.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        request: UploadRequest,
        known: Partial | None,
        clock: Callable[[], float],
        on_end: Callable[["Upload", Partial | None], None],
    ) -> None:
        self.request = request
        self.folder = folder
        self.path = folder / WEIGHTS_NAME
        self.partial = known or Partial(request, 0, clock())  # as upload.json has it
        self.committed_size = self.partial.committed_size  # grows; bytes written and hashed
        self._hash = hashlib.sha256()
        self._fd: int | None = None  # None before `open` and after the end
        self._is_over = False
        self.is_finished = False  # being published: nobody can take it over
        self._taken_over = False
        self._resumes = known is not None
        self._disk = disk
        self._clock = clock
        self._on_end = on_end  # told once, with what is left of the upload
        self._lock = RLock()

    def open(self) -> None:
        """The file is there, with what is committed of it hashed."""
        with self._lock, storage_errors():
            self._check_goes_on()
            try:
                if not self._resumes:
                    self._disk.remove_folder(self.folder)
                    self._disk.make_folder(self.folder)
                self._check_kept()
                self._fd = self._disk.open(self.path, self.committed_size)
                self._hash_kept(self._fd)
            except BaseException:
                if not self._resumes:
                    self._disk.remove_folder(self.folder)
                self._end(self._kept())
                raise

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            fd = self._open_fd()
            if offset != self.committed_size:
                raise offset_mismatch("chunk.offset", offset, self.committed_size)
            if offset + len(data) > self.request.total_size:
                raise InvalidRequestError(
                    "chunk.data",
                    f"goes beyond the declared total_size of {self.request.total_size} bytes",
                )
            with storage_errors():
                self._disk.append(fd, data, offset)
                self._hash.update(data)
                self.committed_size += len(data)
                if self.committed_size - self.partial.committed_size >= NOTE_BYTES:
                    self._note()

    def finish(self) -> str:
        """The whole file is on disk: its sha256 in hexadecimal."""
        with self._lock:
            fd = self._open_fd()
            if self.committed_size != self.request.total_size:
                raise InvalidRequestError(
                    "header.total_size",
                    f"{self.request.total_size} bytes were declared,"
                    f" but {self.committed_size} came",
                )
            with storage_errors():
                self._sync(fd)
            self.is_finished = True
            return self._hash.hexdigest()

    def stage(
        self, sha256: str, config: tuple[str, bytes], extras: Mapping[str, Path]
    ) -> tuple[Path, dict[str, FileRecord]]:
        """A whole blob in the upload's folder, on disk; undone by `suspend` unless it is taken.

        `config` is a file's name and content; `extras`, which can be done without, are moved from
        where they lie.
        """
        with self._lock:
            self._open_fd()
            staged = self.folder / _STAGED_NAME
            self._disk.make_folder(staged)
            files = {WEIGHTS_NAME: FileRecord(self.request.total_size, sha256)}
            self._disk.move(self.path, staged / WEIGHTS_NAME)
            name, content = config
            self._disk.write(staged / name, content)
            files[name] = describe(staged / name)
            for name, source in extras.items():
                try:
                    self._disk.sync(source)
                    file = describe(source)
                    self._disk.move(source, staged / name)
                except OSError as error:
                    logger.warning("adapter store: %s of an upload is not kept: %s", name, error)
                else:
                    files[name] = file
            self._disk.write(staged / RECORD_NAME, files_bytes(files))
            self._disk.sync(staged)
            return staged, files

    def published(self, version: str) -> None:
        """The end of an upload that has its name; remembered, if the disk takes it."""
        with self._lock:
            if self._is_over:
                return
            self.partial = Partial(
                replace(self.request, config_json=""),
                self.request.total_size,
                self._clock(),
                version,
            )
            try:
                self._write_note(self.partial)
                tidy(self._disk, self.folder, keep=(NOTE_NAME,))
            except OSError as error:
                logger.warning("adapter store: the upload is not remembered: %s", error)
            self._end(self.partial)

    def suspend(self) -> None:
        """The stream has ended: what came is kept for the next one, as far as the disk has it."""
        with self._lock:
            if self._is_over:
                return
            if self._fd is None:
                self._end(self._kept())
                return
            try:
                restore(self._disk, self.folder)
                if self.committed_size > self.partial.committed_size:
                    self._note()
            except OSError as error:
                logger.warning("adapter store: the end of an upload is not kept: %s", error)
            if not self._is_over:
                self._keep_or_drop()

    def discard(self) -> None:
        """Forget the upload and all that came; harmless after it was published."""
        with self._lock:
            if not self._is_over:
                self._disk.remove_folder(self.folder)
                self._end(None)

    def take_over(self) -> None:
        """Suspend it for another stream of the same upload_id; UPLOAD_IN_PROGRESS when finished."""
        with self._lock:
            if self._is_over:
                return
            if self.is_finished:
                raise RequestError("UPLOAD_IN_PROGRESS", "the upload is being published")
            self.suspend()
            self._taken_over = True

    def _open_fd(self) -> int:
        self._check_goes_on()
        assert self._fd is not None, "open() comes first"
        return self._fd

    def _check_goes_on(self) -> None:
        if self._taken_over:
            raise RequestError("UPLOAD_TAKEN_OVER", "another stream goes on with this upload")
        if self._is_over:
            raise RequestError("UPLOAD_INCOMPLETE", "the upload has ended")

    def _note(self) -> None:
        """What was written is safe, and said to be."""
        self._sync(self._open_fd())
        partial = Partial(self.request, self.committed_size, self._clock())
        self._write_note(partial)
        self.partial = partial

    def _sync(self, fd: int) -> None:
        try:
            self._disk.sync_file(fd)
        except OSError:
            # The kernel may have dropped what it could not write, and would call the next one good.
            self._keep_or_drop()
            raise

    def _write_note(self, partial: Partial) -> None:
        path = self.folder / NOTE_NAME
        self._disk.replace(path, partial_bytes(partial), path.with_suffix(".new"))

    def _check_kept(self) -> None:
        """A partial that has lost bytes is none."""
        if not self._resumes:
            return
        restore(self._disk, self.folder)
        if size_of(self.path) < self.committed_size:
            self._resumes = False
            raise offset_mismatch("header.resume_offset", self.committed_size, 0)

    def _hash_kept(self, fd: int) -> None:
        offset = 0
        while offset < self.committed_size:
            data = os.pread(fd, min(_READ_BYTES, self.committed_size - offset), offset)
            if not data:
                raise OSError(errno.EIO, "the file of an upload has shrunk")
            self._hash.update(data)
            offset += len(data)

    def _keep_or_drop(self) -> None:
        """The end, with what upload.json tells of; of nothing nothing is kept."""
        if self.partial.committed_size and not self._is_placed():
            self._end(self.partial)
        else:
            self._disk.remove_folder(self.folder)
            self._end(None)

    def _is_placed(self) -> bool:
        """The bytes are a version's by now, whatever became of its name."""
        return not (self.path.exists() or (self.folder / _STAGED_NAME / WEIGHTS_NAME).exists())

    def _kept(self) -> Partial | None:
        """What there is of an upload that could not be opened, or not yet."""
        return self.partial if self._resumes else None

    def _end(self, left: Partial | None) -> None:
        self._is_over = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._on_end(self, left)


def offset_mismatch(field: str, offset: int, committed_size: int) -> RequestError:
    return RequestError(
        "OFFSET_MISMATCH",
        f"offset {offset}, but {committed_size} bytes are committed",
        field=field,
        metadata={"committed_size": str(committed_size)},
    )


def restore(disk: Disk, folder: Path) -> None:
    """Undo what was begun of publishing."""
    weights, staged = folder / WEIGHTS_NAME, folder / _STAGED_NAME / WEIGHTS_NAME
    if staged.exists() and not weights.exists():
        disk.move(staged, weights)
    tidy(disk, folder, keep=(NOTE_NAME, WEIGHTS_NAME))


def tidy(disk: Disk, folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            sweep(disk, path)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
