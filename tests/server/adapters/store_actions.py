"""What is interrupted at every step, by a kill, a failing disk or a power cut; no torch in here.

    python -m tests.server.adapters.store_actions FOLDER

does every ACTION in copies of FOLDER/prepared, FOLDER/ACTION/1, FOLDER/ACTION/2, ..., each killed
one step later than the one before, until one is done; what was acknowledged stands in 1.said, ...
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection
from pathlib import Path

from loraplex.adapters.store import AdapterStore

from tests.server.adapters.store_cases import (
    WEIGHTS,
    FaultyDisk,
    kill,
    open_store,
    publish,
    request_for,
    suspended,
    version_of,
)

KEPT, OLD, NEW = b"kept weights", b"old weights", b"new weights"
SPOILT, PART = b"good bytes", b"part by part"
Say = Callable[[str], object]  # what a client is told


def prepare(root: Path) -> None:
    """`old` and `twin` have one version; `kept` is pinned; `spoilt` is damaged; `part` is half
    uploaded."""
    store = open_store(root)
    publish(store, "kept", KEPT)
    publish(store, "old", OLD)
    publish(store, "twin", OLD)
    publish(store, "spoilt", SPOILT)
    store.set_pinned("kept", True)
    suspended(store, "part", PART, 4)
    (store.blob(store.get("spoilt").version) / WEIGHTS).write_bytes(b"bad")
    store.close()


def upload_in_parts(store: AdapterStore, say: Say) -> None:
    """Goes on with `part`, ends early once more, and finishes."""
    request = request_for("part", PART, resume_offset=4)
    upload = store.begin(request)
    upload.write(4, PART[4:8])
    upload.suspend()
    if store.upload_status(request.upload_id).committed_size == 8:
        say("8 bytes")
    publish(store, "part", PART, resume_offset=8)
    say("done")


def use_and_close(store: AdapterStore, say: Say) -> None:
    store.release(store.acquire("kept").version)
    store.close()
    say("done")


def delete_and_publish(store: AdapterStore, say: Say) -> None:
    store.delete("spoilt")
    say("deleted")
    publish(store, "spoilt", NEW)
    say("done")


def then_done(action: Callable[[AdapterStore], object]) -> Callable[[AdapterStore, Say], None]:
    def run(store: AdapterStore, say: Say) -> None:
        action(store)
        say("done")

    return run


# Names by what they have: the adapter's bytes, whether it can be served, whether it is pinned.
Seen = dict[str, tuple[bytes, str, bool]]
BEFORE: Seen = {
    "kept": (KEPT, "ready", True),
    "old": (OLD, "ready", False),
    "twin": (OLD, "ready", False),
    "spoilt": (SPOILT, "quarantined", False),
}


def seen(store: AdapterStore) -> Seen:
    contents = {version_of(content): content for content in (KEPT, OLD, NEW, SPOILT, PART)}
    return {
        record.adapter_id: (contents[record.version], record.state.value, record.pinned)
        for record in store.list(0, "")[0]
    }


def without(name: str) -> Seen:
    return {key: value for key, value in BEFORE.items() if key != name}


# What may be found, in the order in which it comes to be.
OUTCOMES: dict[str, tuple[Seen, ...]] = {
    "publish": (BEFORE, BEFORE | {"new": (NEW, "ready", False)}),
    "publish known content": (BEFORE, BEFORE | {"new": (OLD, "ready", False)}),
    "replace": (BEFORE, BEFORE | {"kept": (NEW, "ready", True)}),
    "replace the last": (BEFORE, BEFORE | {"spoilt": (NEW, "ready", False)}),
    "repair": (BEFORE, BEFORE | {"spoilt": (SPOILT, "ready", False)}),
    "delete": (BEFORE, without("old")),
    "delete the last": (BEFORE, without("spoilt")),
    "delete and publish": (
        BEFORE,
        without("spoilt"),
        BEFORE | {"spoilt": (NEW, "ready", False)},
    ),
    "resume": (BEFORE, BEFORE | {"part": (PART, "ready", False)}),
    "discard": (BEFORE,),
    "pin": (BEFORE, BEFORE | {"old": (OLD, "ready", True)}),
    "unpin": (BEFORE, BEFORE | {"kept": (KEPT, "ready", False)}),
    "close": (BEFORE,),
}


def outcomes(action: str, said: Collection[str]) -> tuple[Seen, ...]:
    """What may be found when so much was acknowledged."""
    possible = OUTCOMES[action]
    if "done" in said:
        return possible[-1:]
    return possible[1:] if "deleted" in said else possible


ACTIONS: dict[str, Callable[[AdapterStore, Say], None]] = {
    "publish": then_done(lambda store: publish(store, "new", NEW)),
    "publish known content": then_done(lambda store: publish(store, "new", OLD)),
    "replace": then_done(lambda store: publish(store, "kept", NEW, replace=True)),
    "replace the last": then_done(lambda store: publish(store, "spoilt", NEW, replace=True)),
    "repair": then_done(lambda store: publish(store, "spoilt", SPOILT)),
    "delete": then_done(lambda store: store.delete("old")),
    "delete the last": then_done(lambda store: store.delete("spoilt")),
    "delete and publish": delete_and_publish,
    "resume": upload_in_parts,
    "discard": then_done(lambda store: store.clear_upload(request_for("part", PART))),
    "pin": then_done(lambda store: store.set_pinned("old", True)),
    "unpin": then_done(lambda store: store.set_pinned("kept", False)),
    "close": use_and_close,
}


def kill_at_every_step(action: str, prepared: Path, folder: Path) -> None:
    at, killed = 0, True
    while killed:
        at += 1
        shutil.copytree(prepared, folder / str(at))
        child = os.fork()
        if child == 0:
            _do(ACTIONS[action], folder / str(at), at)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and os.waitstatus_to_exitcode(status) != 0:
            sys.exit(f"{action} failed at step {at}")


def _do(action: Callable[[AdapterStore, Say], None], root: Path, at: int) -> None:
    """In a process of its own, which ends here."""
    code = 1
    try:
        disk = FaultyDisk(kill, "torn")
        store = open_store(root, disk=disk)
        disk.steps, disk.at = 0, at
        with root.with_suffix(".said").open("w", buffering=1) as said:
            action(store, lambda text: said.write(f"{text}\n"))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    for name in ACTIONS:
        kill_at_every_step(name, Path(sys.argv[1], "prepared"), Path(sys.argv[1], name))
