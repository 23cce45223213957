"""The adapter store after a kill at every single step, and on a disk that fails at any of them."""

import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from errno import EIO, ENOSPC, EROFS
from pathlib import Path
from shutil import copytree

import pytest
from loraplex.adapters.store import AdapterStore
from loraplex.errors import RequestError

from tests.server.adapters.store_actions import (
    ACTIONS,
    NEW,
    OLD,
    PART,
    outcomes,
    prepare,
    seen,
)
from tests.server.adapters.store_cases import (
    FaultyDisk,
    check_sound,
    open_store,
    publish_as_a_client_does,
    request_for,
    versions_on_disk,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "prepared"
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def killed(prepared: Path) -> Path:
    """A folder an action, with a store for each of its steps."""
    module = "tests.server.adapters.store_actions"
    subprocess.run([sys.executable, "-m", module, prepared.parent], cwd=ROOT, check=True)
    return prepared.parent


def check_found(store: AdapterStore, root: Path, action: str, said: Collection[str]) -> None:
    assert seen(store) in outcomes(action, said)
    check_sound(store, root)


def check_goes_on(store: AdapterStore, said: Collection[str]) -> None:
    """Whatever was interrupted can be done again, and half an upload can be gone on with."""
    with suppress(RequestError):  # it was discarded, or had its version but not its name
        committed = store.upload_status(request_for("part", PART).upload_id).committed_size
        assert committed >= (8 if "8 bytes" in said else 4)
    for name, content in (("part", PART), ("new", OLD), ("spoilt", NEW)):
        publish_as_a_client_does(store, name, content)
    for name in seen(store):
        store.delete(name)


@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_step_leaves_all_or_nothing(killed: Path, action: str) -> None:
    """By SIGKILL, each in a process of its own; see store_actions."""
    at = 0
    while (root := killed / action / str(at + 1)).exists():
        at += 1
        said = root.with_suffix(".said").read_text().splitlines()
        store = open_store(root)
        check_found(store, root, action, said)
        check_goes_on(store, said)
        assert versions_on_disk(root) == set()
        store.close()
    assert said[-1] == "done"  # the last one ran to its end


@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("torn", ENOSPC, "DISK_FULL"),
        ("after", EIO, "STORE_UNAVAILABLE"),
        ("dead", EROFS, "STORE_UNAVAILABLE"),
    ],
)
@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "close"])
def test_a_disk_that_fails_at_any_step_harms_nothing(
    tmp_path: Path, prepared: Path, action: str, how: str, code: int, reason: str
) -> None:
    at, fired, reasons = 0, True, set()
    while fired:
        at += 1
        root = tmp_path / str(at)
        copytree(prepared, root)
        disk = FaultyDisk(lambda: OSError(code, "no"), how)
        store = open_store(root, disk=disk)
        reader = store.acquire("twin")
        disk.steps, disk.at = 0, at
        said: list[str] = []
        try:
            ACTIONS[action](store, said.append)
        except RequestError as error:
            reasons.add(error.reason.name)
            assert "done" not in said
        fired, disk.at = disk.steps >= at, None
        # What is told now is what a restart finds, and what others read is unharmed.
        assert seen(store) in outcomes(action, said)
        now = seen(store)
        store.verify(reader.version)
        store.release(reader.version)
        if how == "dead":
            store.sweep()  # by then the disk is well again, and is told what it missed
        copytree(root, found := tmp_path / f"{at} found")  # as a kill would leave it
        again = open_store(found)
        assert seen(again) == now or action == "repair"  # which may turn out to have been done
        check_found(again, found, action, said)
        check_goes_on(store if how == "after" else again, said)
        assert versions_on_disk(root if how == "after" else found) == set()
        again.close()
        store.close()
    assert reasons - {"OFFSET_MISMATCH"} <= {reason}  # the last step of "resume" after a failed one
