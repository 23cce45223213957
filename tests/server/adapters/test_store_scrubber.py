"""The scrubber goes round at its pace, sweeps in time, survives what it meets, and stops."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from loraplex.adapters.store import AdapterState
from loraplex.adapters.store_scrubber import Scrubber
from loraplex.errors import RequestError

from tests.server.adapters.store_cases import WEIGHTS, open_store, publish, states


class Time:
    """A clock that only waiting moves; it says stop at its end, and remembers every wait."""

    def __init__(self, end: float) -> None:
        self.now = 0.0
        self.end = end
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        return self.now >= self.end


class FakeStore:
    """Two versions of 100 and 300 bytes, read in pieces of 50; says when it was asked for what."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.done: list[tuple[float, str]] = []
        self.error: RequestError | None = None

    def versions(self) -> tuple[str, ...]:
        return ("one", "two")

    def scrub(self, version: str, on_bytes: Callable[[int], object]) -> None:
        for _ in range({"one": 2, "two": 6}[version]):
            on_bytes(50)
        self.done.append((self.time.now, version))
        self._fail()

    def sweep(self) -> None:
        self.done.append((self.time.now, "sweep"))
        self._fail()

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


def run(store: FakeStore, time: Time) -> list[tuple[float, str]]:
    scrubber = Scrubber(
        store,
        bytes_per_second=10,
        rest_seconds=100,
        sweep_seconds=60,
        clock=time.clock,
        wait=time.wait,
    )
    scrubber.start()
    scrubber.stop()
    return store.done


@pytest.mark.parametrize("error", [None, RequestError("STORE_UNAVAILABLE", "no")])
def test_a_pass_takes_its_time_and_sweeps_do_not_wait_for_it(error: RequestError | None) -> None:
    time = Time(end=250)
    store = FakeStore(time)
    store.error = error
    sweeps = [(60.0 * number, "sweep") for number in range(5)]
    passes = [(110.0, "one"), (140.0, "two"), (250.0, "one")]
    assert run(store, time) == sorted([*sweeps, *passes[:2]])
    assert max(time.waits) <= 60


def test_damage_is_found_before_anybody_asks(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    harmed = publish(store, "alice")
    publish(store, "bob", b"other")
    store.verify(harmed.version)
    (store.blob(harmed.version) / WEIGHTS).write_bytes(b"weighty")
    found = threading.Event()

    def wait(seconds: float) -> bool:
        if AdapterState.QUARANTINED in states(store).values():
            found.set()
        return found.is_set()

    scrubber = Scrubber(store, rest_seconds=0, wait=wait)
    scrubber.start()
    assert found.wait(10)
    scrubber.stop()
    assert states(store) == {"alice": AdapterState.QUARANTINED, "bob": AdapterState.READY}
    store.close()


def test_it_stops_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    publish(store, "alice", bytes(1 << 20))
    scrubber = Scrubber(store, rest_seconds=0, bytes_per_second=1)
    scrubber.start()
    scrubber.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "loraplex-scrubber"]
    store.close()
