"""What is acknowledged is on disk: the order of fsyncs and renames, and a power cut at any step.

A kill keeps what the kernel has not written yet, so these play a disk that forgets it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from loraplex.adapters.store_files import Disk

from tests.server.adapters.store_actions import ACTIONS, PART, outcomes, prepare, seen
from tests.server.adapters.store_cases import check_sound, open_store, request_for

DURABLE = [action for action in ACTIONS if action not in ("close", "discard")]  # promise nothing


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare(folder)
    return folder


class RecordingDisk(Disk):
    """Writes down, step by step, what is not on disk yet and what may not be done before it is."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.dirty: set[int] = set()  # inodes of files with bytes that no fsync followed
        self.loose: dict[Path, str] = {}  # folders with names that no fsync followed: the last step

    def make(self, path: Path) -> None:
        is_new = not path.exists()
        super().make(path)
        if is_new:
            self._name(path, "make")

    def open(self, path: Path, size: int) -> int:
        is_new = not path.exists()
        fd = super().open(path, size)
        if is_new:
            self._name(path, "open")
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self.dirty.add(os.fstat(fd).st_ino)
        return super().pwrite(fd, data, offset)

    def sync_file(self, fd: int) -> None:
        super().sync_file(fd)
        self.dirty.discard(os.fstat(fd).st_ino)

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.dirty.discard(path.stat().st_ino)
        self.loose.pop(path, None)

    def rename(self, source: Path, target: Path) -> None:
        below = [source, *source.rglob("*")]
        assert not [path for path in below if path.stat().st_ino in self.dirty], f"to {target}"
        assert not [path for path in below if path in self.loose], f"to {target}"
        super().rename(source, target)
        self._name(target, "rename")

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._name(path, "remove")

    def _name(self, path: Path, step: str) -> None:
        self.loose[path.parent] = step
        self.log.append(f"{step} {path.name}")


@pytest.mark.parametrize("action", DURABLE)
def test_file_fsync_then_rename_then_folder_fsync_then_the_answer(
    tmp_path: Path, prepared: Path, action: str
) -> None:
    root = copytree(prepared, tmp_path / "store")
    disk = RecordingDisk()
    store = open_store(root, disk=disk)
    disk.log.clear()
    answers = []

    def say(answer: str) -> None:
        """By now nothing may be loose but what is on its way out."""
        lasting = {"manifests", "blobs"} if answer != "8 bytes" else {"uploads"}
        loose = {path.relative_to(root).parts[0] for path in disk.loose}
        assert loose & lasting == set(), disk.loose
        answers.append(len(disk.log))

    ACTIONS[action](store, say)
    assert answers
    assert answers[0] > 0
    store.close()


class PowerCutDisk(Disk):
    """Keeps a second account: what each file's bytes and each folder's names were when fsynced.

    After every step it can `restore` a store as a power cut might leave it then.
    """

    def __init__(self, root: Path) -> None:
        self.on_step: Callable[[], None] | None = None
        self._root = root
        self._files: dict[int, bytes] = {}  # by inode
        self._folders: dict[int, dict[str, int]] = {}
        self._held: dict[int, int] = {}  # open descriptors, so that no inode is used twice
        for path in (root, *root.rglob("*")):
            self._synced(path)

    def restore(self, target: Path, *, names_survive: bool) -> None:
        """`names_survive`: the folders are as they are now, but files have what was fsynced."""
        if names_survive:
            for path in (self._root, *self._root.rglob("*")):
                copy = target / path.relative_to(self._root)
                if path.is_dir():
                    copy.mkdir()
                else:
                    copy.write_bytes(self._files.get(path.stat().st_ino, b""))
        else:
            self._restore(self._root.stat().st_ino, target)

    def close(self) -> None:
        for fd in self._held.values():
            os.close(fd)

    def make(self, path: Path) -> None:
        super().make(path)
        self._hold(path)
        self._after_step()

    def open(self, path: Path, size: int) -> int:
        fd = super().open(path, size)
        self._hold(path)
        self._after_step()
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        written = super().pwrite(fd, data, offset)
        self._after_step()
        return written

    def sync_file(self, fd: int) -> None:
        self._files[os.fstat(fd).st_ino] = os.pread(fd, 1 << 20, 0)
        self._after_step()

    def sync(self, path: Path) -> None:
        if path != self._root.parent:
            self._synced(path)
        self._after_step()

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._after_step()

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._after_step()

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self._after_step()

    def _after_step(self) -> None:
        if self.on_step is not None:
            self.on_step()

    def _synced(self, path: Path) -> None:
        inode = self._hold(path)
        if path.is_dir():
            self._folders[inode] = {entry.name: self._hold(entry) for entry in path.iterdir()}
        else:
            self._files[inode] = path.read_bytes()

    def _hold(self, path: Path) -> int:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _restore(self, inode: int, target: Path) -> None:
        if inode in self._folders or os.path.isdir(f"/proc/self/fd/{self._held[inode]}"):
            target.mkdir()
            for name, child in self._folders.get(inode, {}).items():
                self._restore(child, target / name)
        else:
            target.write_bytes(self._files.get(inode, b""))


@pytest.mark.parametrize("action", DURABLE)
def test_a_power_cut_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, prepared: Path, action: str
) -> None:
    root = copytree(prepared, tmp_path / "store")
    cuts: list[tuple[Path, tuple[str, ...]]] = []
    said: list[str] = []

    def cut() -> None:
        for names_survive in (False, True):
            target = tmp_path / str(len(cuts))
            disk.restore(target, names_survive=names_survive)
            cuts.append((target, tuple(said)))

    def say(answer: str) -> None:
        said.append(answer)
        if answer == "8 bytes":
            promised.extend(range(len(cuts), len(cuts) + 2))
        cut()

    promised: list[int] = []
    disk = PowerCutDisk(root)
    store = open_store(root, disk=disk)
    disk.on_step = cut
    ACTIONS[action](store, say)
    disk.on_step = None
    for number, (target, acknowledged) in enumerate(cuts):
        again = open_store(target)
        assert seen(again) in outcomes(action, acknowledged)
        check_sound(again, target)
        if number in promised or not acknowledged:
            committed = again.upload_status(request_for("part", PART).upload_id).committed_size
            assert committed >= (8 if number in promised else 4)
        again.close()
    store.close()
    disk.close()
    assert said[-1] == "done"
