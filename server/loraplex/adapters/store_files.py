"""What the adapter store does to its disk: durable writes, and one upload's growing file.

The order is always: write to a temporary name on the same file system, fsync the file, rename it,
fsync the folder. A reader never sees half of anything.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.errors import InvalidRequestError, RequestError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a blob must be."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


class Disk:
    """The operations the store is made of; tests put one that fails in its place."""

    def make_folder(self, path: Path) -> None:
        """Durable when it returns, also if somebody else made it."""
        path.mkdir(exist_ok=True)
        self.sync(path.parent)

    def write(self, path: Path, data: bytes) -> None:
        """A new file that is on disk; its name is, once the folder is synced."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def append(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(fd, left, offset)
            left = left[written:]
            offset += written

    def sync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def move(self, source: Path, target: Path) -> None:
        """Atomic, and durable when it returns; replaces a file, never a folder that holds any."""
        source.replace(target)
        self.sync(target.parent)

    def remove(self, path: Path) -> None:
        """Durable once the folder is synced."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """As far as it goes: what stays behind is swept when the store is opened again."""
        shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


def describe(path: Path) -> FileRecord:
    """Size and sha256 of a file as it is on disk now."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
    return FileRecord(size, digest.hexdigest())


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """The world's faults as the contract names them; paths stay in the log."""
    try:
        yield
    except OSError as error:
        logger.warning("adapter store: %s", error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RequestError("DISK_FULL", "the adapter store has no room left") from error
        text = os.strerror(error.errno) if error.errno else "an I/O error"
        raise RequestError("STORE_UNAVAILABLE", f"the adapter store fails: {text}") from error


class Upload:
    """A file that arrives in pieces, in a folder of its own in the store's temporary area.

    Its methods may run in different threads, even `discard` beside a `write` of a cancelled call.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        adapter_id: str,
        total_size: int,
        on_end: Callable[["Upload"], None],
    ) -> None:
        self.adapter_id = adapter_id
        self.folder = folder
        self.path = folder / WEIGHTS_NAME
        self.total_size = total_size  # bytes
        self.committed_size = 0  # grows; bytes that were written and hashed
        self._hash = hashlib.sha256()
        self._fd: int | None = None  # None before `open` and after the end
        self._disk = disk
        self._lock = Lock()
        self._on_end = on_end

    def open(self) -> None:
        self._disk.make_folder(self.folder)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            fd = self._open_fd()
            if offset != self.committed_size:
                raise RequestError(
                    "OFFSET_MISMATCH",
                    f"offset {offset}, but {self.committed_size} bytes are committed",
                    field="chunk.offset",
                    metadata={"committed_size": str(self.committed_size)},
                )
            if offset + len(data) > self.total_size:
                raise InvalidRequestError(
                    "chunk.data", f"goes beyond the declared total_size of {self.total_size} bytes"
                )
            with storage_errors():
                self._disk.append(fd, data, offset)
            self._hash.update(data)
            self.committed_size += len(data)

    def finish(self) -> str:
        """The whole file is on disk: its sha256 in hexadecimal."""
        with self._lock:
            fd = self._open_fd()
            if self.committed_size != self.total_size:
                raise InvalidRequestError(
                    "header.total_size",
                    f"{self.total_size} bytes were declared, but {self.committed_size} came",
                )
            with storage_errors():
                os.fsync(fd)
            return self._hash.hexdigest()

    def discard(self) -> None:
        """Forget the upload and free its adapter_id; harmless after it was published."""
        with self._lock:
            if self._fd is None:
                return
            os.close(self._fd)
            self._fd = None
        self._disk.remove_folder(self.folder)
        self._on_end(self)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise RequestError("UPLOAD_INCOMPLETE", "the upload was discarded")
        return self._fd
