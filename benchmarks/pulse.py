"""Whether the client itself kept up: how late its event loop wakes, and how busy it is."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

INTERVAL = 0.05
"""Seconds between two beats."""

_BEATS_A_REPORT = 5


class Pulse:
    """A task that only sleeps: what it sleeps too long, everything else on the loop waits as well.

    Mutable: `lags`, one a beat; `stopped_at` and `cpu_share`, set when the beating ends.
    """

    def __init__(self) -> None:
        self.lags: list[float] = []  # seconds
        self.stopped_at = 0.0  # of `time.monotonic`
        self.cpu_share = 0.0  # of one core, by the thread of the event loop

    @asynccontextmanager
    async def beating(self, report: Callable[[], None]) -> AsyncIterator[None]:
        """Inside, it beats, and calls `report` a few times a second."""
        began, cpu = time.monotonic(), time.thread_time()
        task = asyncio.create_task(self._beat(report))
        try:
            yield
        finally:
            self.stopped_at = time.monotonic()
            self.cpu_share = (time.thread_time() - cpu) / max(self.stopped_at - began, 1e-9)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _beat(self, report: Callable[[], None]) -> None:
        while True:
            for _ in range(_BEATS_A_REPORT):
                before = time.monotonic()
                await asyncio.sleep(INTERVAL)
                self.lags.append(time.monotonic() - before - INTERVAL)
            report()
