"""Reads the whole store again and again, slowly, so that damage is found before it is needed."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Protocol

from loraplex.errors import RequestError

logger = logging.getLogger(__name__)

BYTES_PER_SECOND = float(8 << 20)
REST_SECONDS = 600.0
SWEEP_SECONDS = 60.0


class Scrubbed(Protocol):
    """The store, as far as the scrubber needs it."""

    def versions(self) -> tuple[str, ...]: ...

    def scrub(self, version: str, on_bytes: Callable[[int], object]) -> None: ...

    def sweep(self) -> None: ...


class Scrubber:
    """A thread that hashes versions one after another and sweeps in between."""

    def __init__(
        self,
        store: Scrubbed,
        *,
        bytes_per_second: float = BYTES_PER_SECOND,
        rest_seconds: float = REST_SECONDS,
        sweep_seconds: float = SWEEP_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        """It rests before every pass. `wait` waits some seconds, and says whether to stop."""
        self._store = store
        self._bytes_per_second = bytes_per_second
        self._rest_seconds = rest_seconds
        self._sweep_seconds = sweep_seconds
        self._clock = clock
        self._stopping = Event()
        self._wait = wait or self._stopping.wait
        self._thread = Thread(target=self._run, name="loraplex-scrubber", daemon=True)
        self._next_sweep = 0.0  # changes on the thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended: within the reading of one piece of a file."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        self._next_sweep = self._clock()
        with suppress(_StoppedError):
            while True:
                self._pause(self._rest_seconds)
                for version in self._store.versions():
                    self._scrub(version)

    def _scrub(self, version: str) -> None:
        try:
            self._store.scrub(version, self._pace)
        except RequestError as error:  # it is gone, quarantined by now, or cannot be read today
            logger.info("scrub of %s: %s", version[:12], error.message)

    def _pace(self, num_bytes: int) -> None:
        self._pause(num_bytes / self._bytes_per_second)

    def _pause(self, seconds: float) -> None:
        """Sweeps when that is due meanwhile."""
        until = self._clock() + seconds
        while True:
            if self._clock() >= self._next_sweep:
                self._sweep()
            now = self._clock()
            if self._wait(max(0.0, min(until, self._next_sweep) - now)):
                raise _StoppedError
            if self._clock() >= until:
                return

    def _sweep(self) -> None:
        self._next_sweep = self._clock() + self._sweep_seconds
        try:
            self._store.sweep()
        except RequestError as error:
            logger.warning("adapter store: not swept: %s", error.message)


class _StoppedError(Exception):
    """The thread is to end."""
