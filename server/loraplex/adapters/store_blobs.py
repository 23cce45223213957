"""Content under its version: a folder of files that never change, kept while anybody needs it."""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from loraplex.adapters.peft import CONFIG_NAME
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_files import Disk, FileRecord, describe, storage_errors
from loraplex.adapters.store_records import files_bytes, is_digest, parse_files
from loraplex.errors import RequestError
from loraplex.priority import give_way

logger = logging.getLogger(__name__)

RECORD_NAME = "record.json"
_QUARANTINE_NAME = "quarantined"  # an empty file: the damage outlives the process that found it
_TRUTH = (WEIGHTS_NAME, CONFIG_NAME)  # a blob's other files are caches, dropped when they differ


@dataclass(slots=True)
class Blob:
    """One version's folder. All of it changes, under the lock of its BlobStore."""

    files: dict[str, FileRecord]
    damaged: bool = False
    verified: bool = False  # its hashes were checked in this process
    readers: int = 0  # requests that run on it
    checks: int = 0  # under way
    names: set[str] = field(default_factory=set)
    checking: Lock = field(default_factory=Lock)  # held while the files are hashed

    @property
    def is_needed(self) -> bool:
        return bool(self.names or self.readers or self.checks)


class BlobStore:
    """The versions on disk, with who holds them: names, which are durable, and readers.

    `_lock` guards what is in memory, for moments only. `exclusive` orders what changes the disk.
    """

    def __init__(
        self, root: Path, temporary: Path, disk: Disk, on_removed: Callable[[str], None]
    ) -> None:
        self._root = root
        self._temporary = temporary
        self._disk = disk
        self._on_removed = on_removed  # told just before a version's files go
        self._lock = Lock()
        self._disk_lock = Lock()
        self._collector = ThreadPoolExecutor(1, "loraplex-collector", give_way)

        self._open = True
        self._blobs: dict[str, Blob] = {}
        self._garbage: set[str] = set()  # versions to remove, unless they are in use again

    def folder(self, version: str) -> Path:
        return self._root / version[:2] / version

    def new_temporary(self) -> Path:
        """A name in the temporary area that nothing has yet."""
        return self._temporary / secrets.token_hex(16)

    def require(self, version: str) -> None:
        """ADAPTER_NOT_FOUND unless the version is here."""
        with self._lock:
            self._known(version)

    def is_damaged(self, version: str) -> bool:
        with self._lock:
            blob = self._blobs.get(version)
            return blob is None or blob.damaged

    def retain(self, version: str) -> None:
        with self._lock:
            self._known(version).readers += 1

    def release(self, version: str) -> None:
        """The files of what nobody needs any more go later: removing them may take long."""
        with self._lock:
            blob = self._blobs[version]
            assert blob.readers > 0
            blob.readers -= 1
            if blob.is_needed:
                return
            self._garbage.add(version)
        with contextlib.suppress(RuntimeError):  # closed: they are swept at the next start
            self._collector.submit(self._collect)

    def references(self, version: str) -> int:
        with self._lock:
            blob = self._blobs.get(version)
            return blob.readers if blob is not None else 0

    def versions(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(sorted(self._blobs))

    def weights_sha256(self, version: str) -> str | None:
        """Of the safetensors file; None when it is not known to be what it was."""
        with self._lock:
            blob = self._blobs.get(version)
            file = blob.files.get(WEIGHTS_NAME) if blob is not None else None
            return file.sha256 if file is not None else None

    def link(self, version: str, adapter_id: str) -> None:
        """No-op for a version that is not here, as an unreadable manifest's."""
        with self._lock:
            if blob := self._blobs.get(version):
                blob.names.add(adapter_id)

    def unlink(self, version: str, adapter_id: str) -> None:
        """Whoever is exclusive removes the version afterwards, if nobody holds it."""
        with self._lock:
            if blob := self._blobs.get(version):
                blob.names.discard(adapter_id)
                self._garbage.add(version)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Alone with the disk; what became garbage meanwhile is removed afterwards."""
        try:
            with self._disk_lock:
                if not self._open:
                    raise RequestError("STORE_UNAVAILABLE", "the adapter store is closed")
                yield
        finally:
            self._collect()

    def place(self, version: str, staged: Path, files: dict[str, FileRecord]) -> bool:
        """The staged folder becomes the version's, unless that has a sound one; when exclusive.

        Without a name or reader by the end of it, the version is removed again. True: it took the
        place of a damaged one.
        """
        with self._lock:
            blob = self._blobs.get(version)
            self._garbage.add(version)
        if blob is not None and not blob.damaged:
            for name in files.keys() - blob.files.keys():
                self._add(version, blob, name, staged / name, files[name])
            return False
        target = self.folder(version)
        self._disk.make_folder(target.parent)
        if target.exists():
            trash = self.new_temporary()
            self._disk.move(target, trash)
            self._disk.remove_folder(trash)
        self._disk.move(staged, target)
        with self._lock:
            if blob is None:
                self._blobs[version] = Blob(files, verified=True)  # hashed when they came
            else:
                blob.files, blob.damaged, blob.verified = files, False, True
        return blob is not None

    def cache(self, version: str, name: str) -> Path | None:
        """Where a cache lies that is one of the version's files, and sound as far as is known."""
        with self._lock:
            return self.folder(version) / name if name in self._known(version).files else None

    def add_file(self, version: str, name: str, source: Path) -> None:
        assert name not in (*_TRUTH, RECORD_NAME, _QUARANTINE_NAME)
        self._disk.sync(source)
        file = describe(source)
        with self.exclusive():
            with self._lock:
                blob = self._known(version)
            self._add(version, blob, name, source, file)

    def is_sound(self, version: str) -> bool:
        """Whether the version is here, by its bytes: hashed, if that was not done yet."""
        try:
            self.verify(version)
        except RequestError as error:
            if error.reason.name not in ("ADAPTER_NOT_FOUND", "ADAPTER_UNUSABLE"):
                raise
            return False
        return True

    def verify(self, version: str) -> None:
        with self._checked(version) as blob, blob.checking:
            if not blob.verified and not blob.damaged:
                self._check_files(version, blob)
            if blob.damaged:
                raise RequestError(
                    "ADAPTER_UNUSABLE",
                    f"version {version} is quarantined: its bytes on disk differ from what was"
                    " uploaded; the same upload again repairs it",
                )

    def scrub(self, version: str, on_bytes: Callable[[int], object]) -> None:
        """Hash the files again, at the pace of `on_bytes`; what differs then is verified anew."""
        with self._checked(version) as blob:
            with self._lock:
                files = {} if blob.damaged else dict(blob.files)
            # `checking` is not held: a load must not wait for a slow scrub.
            if all(self._is_whole(version, name, files[name], on_bytes) for name in files):
                return
            with self._lock:
                blob.verified = False
            self.verify(version)

    def write(self, path: Path, data: bytes) -> None:
        """The file has this content, or still what it had."""
        self._disk.replace(path, data, self.new_temporary())

    def load(self, version: str, adapter_id: str) -> None:
        """Read a version that a manifest names, when the store is opened; sizes are checked."""
        if version not in self._blobs:
            self._blobs[version] = self._read(version)
        self._blobs[version].names.add(adapter_id)

    def sweep(self) -> None:
        """Remove what no manifest names, when the store is opened."""
        for path in self._root.glob("*/*"):
            if path.name not in self._blobs and is_digest(path.name):
                self._disk.remove_folder(path)

    def close(self) -> None:
        """Nothing is written from here on."""
        with self._disk_lock:
            self._open = False
        self._collector.shutdown()

    def _known(self, version: str) -> Blob:
        blob = self._blobs.get(version)
        if blob is None:
            raise RequestError("ADAPTER_NOT_FOUND", f"there is no adapter of version {version}")
        return blob

    def _collect(self) -> None:
        """Remove garbage, unless somebody has the disk, who will do it when done."""
        while self._garbage and self._disk_lock.acquire(blocking=False):
            try:
                if not self._open:
                    return
                for version in self._take_unused():
                    self._on_removed(version)
                    self._disk.remove_folder(self.folder(version))
            finally:
                self._disk_lock.release()

    def _take_unused(self) -> list[str]:
        with self._lock:
            unused = []
            for version in self._garbage:
                blob = self._blobs.get(version)
                if blob is not None and not blob.is_needed:
                    del self._blobs[version]
                    unused.append(version)
            self._garbage.clear()
            return unused

    def _add(self, version: str, blob: Blob, name: str, source: Path, file: FileRecord) -> None:
        self._disk.move(source, self.folder(version) / name)
        self._keep_record(version, blob, {**blob.files, name: file})

    def _keep_record(self, version: str, blob: Blob, files: Mapping[str, FileRecord]) -> None:
        self.write(self.folder(version) / RECORD_NAME, files_bytes(files))
        with self._lock:
            blob.files = dict(files)

    @contextlib.contextmanager
    def _checked(self, version: str) -> Iterator[Blob]:
        """Keep the files while they are read."""
        with self._lock:
            blob = self._known(version)
            blob.checks += 1
        try:
            yield blob
        finally:
            with self._lock:
                blob.checks -= 1
                self._garbage.add(version)
            self._collect()

    def _is_whole(
        self,
        version: str,
        name: str,
        expected: FileRecord,
        on_bytes: Callable[[int], object] | None = None,
    ) -> bool:
        path = self.folder(version) / name
        with storage_errors():
            try:
                if not path.is_file():
                    return False
                if on_bytes is not None and name in _TRUTH:  # the others are in use, and mapped
                    self._disk.forget(path)
                return describe(path, on_bytes) == expected
            except OSError:
                if name in _TRUTH:
                    raise
                return False

    def _check_files(self, version: str, blob: Blob) -> None:
        for name, expected in dict(blob.files).items():
            if self._is_whole(version, name, expected):
                continue
            if name in _TRUTH:
                self._quarantine(version, blob)
                return
            self._drop(version, name, blob)
        with self._lock:
            blob.verified = True

    def _drop(self, version: str, name: str, blob: Blob) -> None:
        """From memory whatever the disk says: what the next start finds there it verifies anew."""
        logger.warning("adapter store: %s of %s differs and is dropped", name, version)
        with self.exclusive():
            files = {kept: file for kept, file in blob.files.items() if kept != name}
            with self._lock:
                blob.files = files
            try:
                self._disk.remove(self.folder(version) / name)
                self._keep_record(version, blob, files)
            except OSError as error:
                logger.warning("adapter store: %s of %s stays on disk: %s", name, version, error)

    def _quarantine(self, version: str, blob: Blob) -> None:
        logger.error("adapter store: the bytes of %s differ from what was uploaded", version)
        with self._lock:
            blob.damaged = True
        try:
            with self.exclusive():
                self.write(self.folder(version) / _QUARANTINE_NAME, b"")
        except OSError as error:
            logger.warning("adapter store: the quarantine is not written down: %s", error)

    def _read(self, version: str) -> Blob:
        sizes = _file_sizes(self.folder(version))
        files = _read_record(self.folder(version)) if RECORD_NAME in sizes else {}
        sound = {name: file for name, file in files.items() if sizes.get(name) == file.size}
        whole = all(name in sound for name in _TRUTH) and _QUARANTINE_NAME not in sizes
        return Blob(sound, damaged=not whole)


def _read_record(folder: Path) -> dict[str, FileRecord]:
    """Empty when it cannot be read."""
    try:
        return parse_files((folder / RECORD_NAME).read_bytes()) or {}
    except OSError as error:
        logger.error("adapter store: %s", error)
        return {}


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes by name, of one listing; empty when there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return {}
