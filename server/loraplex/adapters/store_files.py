"""What the adapter store does to its disk: single steps, and the durable writes made of them.

The order is always: write to a temporary name on the same file system, fsync the file, rename it,
fsync the folder. A reader never sees half of anything.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loraplex.errors import RequestError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a blob must be."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


class Disk:
    """The operations the store is made of; tests put one that fails in its place.

    Down to `free_bytes` they are single steps of the operating system, and nothing else of the
    store changes the disk; those behind it are made of these steps.
    """

    def make(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def open(self, path: Path, size: int) -> int:
        """A file that holds its first `size` bytes, to be written behind them."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(fd, size)
        except OSError:
            os.close(fd)
            raise
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """How many bytes were written, perhaps not all."""
        return os.pwrite(fd, data, offset)

    def sync_file(self, fd: int) -> None:
        os.fsync(fd)

    def sync(self, path: Path) -> None:
        """Of a folder: the names in it are on disk. Of a file: its bytes."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; replaces a file, never a folder that holds any."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Durable once the folder is synced."""
        path.unlink(missing_ok=True)

    def remove_folder(self, path: Path) -> None:
        """As far as it goes: what stays behind is swept when the store is opened again."""
        shutil.rmtree(path, ignore_errors=True)

    def forget(self, path: Path) -> None:
        """The next reader gets the disk's bytes, where the system lets us ask for that."""
        if hasattr(os, "posix_fadvise"):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    def lock(self, path: Path) -> int:
        """BlockingIOError when another process has it. A read-only disk will do."""
        try:
            fd = self.open(path, 0)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def make_folder(self, path: Path) -> None:
        """Durable when it returns, also if somebody else made it."""
        self.make(path)
        self.sync(path.parent)

    def append(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = self.pwrite(fd, left, offset)
            if written < 1:
                raise OSError(errno.EIO, "nothing could be written")
            left = left[written:]
            offset += written

    def write(self, path: Path, data: bytes) -> None:
        """The file's bytes are on disk; its name is, once the folder is synced."""
        fd = self.open(path, 0)
        try:
            self.append(fd, data, 0)
            self.sync_file(fd)
        finally:
            os.close(fd)

    def move(self, source: Path, target: Path) -> None:
        """Durable when it returns."""
        self.rename(source, target)
        self.sync(target.parent)

    def replace(self, path: Path, data: bytes, temporary: Path) -> None:
        """The file has this content, durably, or still what it had."""
        try:
            self.write(temporary, data)
            self.move(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise


def sweep(disk: Disk, path: Path) -> None:
    """Remove a file or a folder that is of no use, as far as the disk lets us."""
    if path.is_dir():
        disk.remove_folder(path)
        return
    try:
        disk.remove(path)
    except OSError as error:
        logger.warning("adapter store: left lying about: %s", error)


def describe(path: Path, on_bytes: Callable[[int], object] | None = None) -> FileRecord:
    """Size and sha256 of a file as it is on disk now. `on_bytes` is told of every piece read."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
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
