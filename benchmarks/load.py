"""Requests sent when they are due, or when a client is free."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from loraplex_client import AsyncClient, LoraplexError
from outcome import Asking, Outcome, ask
from pulse import Pulse
from workload import Request


@dataclass(frozen=True, slots=True)
class Pace:
    """When the next request goes out.

    Open loop: when it is due, whatever became of the others; its latencies count from that moment,
    even where it goes out later. A slow server thus cannot hide by slowing its clients
    ("coordinated omission"). Closed loop: when one of `concurrency` clients is free.
    """

    is_open: bool
    concurrency: int | None = None  # in an open loop the most that run at one time
    cut_after: float | None = None  # seconds; what runs then is left where it is


@dataclass(frozen=True, slots=True)
class Run:
    """What one pass through a workload gave."""

    outcomes: Sequence[Outcome]
    num_requests: int  # of the workload; fewer were sent where it was cut
    start: float  # on the outcomes' clock
    end: float
    lags: Sequence[float]  # of the client's event loop, seconds
    cpu_share: float  # of one core, the client's event loop
    is_interrupted: bool = False

    @property
    def seconds(self) -> float:
        return max(self.end - self.start, 1e-9)


class Load:
    """One pass through a workload. Mutable: `_outcomes`, in the order of being due, `_pulse`."""

    def __init__(
        self, client: AsyncClient, requests: Sequence[Request], pace: Pace, asking: Asking
    ) -> None:
        self._client = client
        self._requests = requests
        self._pace = pace
        self._asking = asking
        self._outcomes: list[Outcome] = []
        self._start = 0.0
        self._pulse = Pulse()

    async def run(self, report: Callable[[int, int], None]) -> None:
        """Until the last answer, or the cut; `report` is told how many are done, of how many."""
        total = len(self._requests)
        # A collection of all that lies around already would stop the clock for everyone.
        gc.collect()
        gc.freeze()
        try:
            async with self._pulse.beating(lambda: report(self._num_done(), total)):
                self._start = time.monotonic()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pace.cut_after):
                        await (self._open() if self._pace.is_open else self._closed())
        finally:
            gc.unfreeze()
        report(self._num_done(), total)

    def result(self, is_interrupted: bool = False) -> Run:
        """Of a run that has ended, or that Ctrl-C has ended."""
        return Run(
            outcomes=self._outcomes,
            num_requests=len(self._requests),
            start=self._start,
            end=self._pulse.stopped_at,
            lags=self._pulse.lags,
            cpu_share=self._pulse.cpu_share,
            is_interrupted=is_interrupted,
        )

    async def _open(self) -> None:
        places = asyncio.Semaphore(self._pace.concurrency or len(self._requests) or 1)

        async def in_turn(outcome: Outcome) -> None:
            async with places:
                await self._ask(outcome)

        async with asyncio.TaskGroup() as group:
            for request in self._requests:
                due = self._start + request.at
                pause = due - time.monotonic()
                if pause > 0:
                    await asyncio.sleep(pause)
                outcome = Outcome(request, due)
                self._outcomes.append(outcome)
                group.create_task(in_turn(outcome))

    async def _closed(self) -> None:
        left = iter(self._requests)
        async with asyncio.TaskGroup() as group:
            for first in islice(left, self._pace.concurrency):
                group.create_task(self._ask_on(first, left))

    async def _ask_on(self, first: Request, left: Iterator[Request]) -> None:
        request: Request | None = first
        while request is not None:
            outcome = Outcome(request, time.monotonic())
            self._outcomes.append(outcome)
            await self._ask(outcome)
            request = next(left, None)

    async def _ask(self, outcome: Outcome) -> None:
        with suppress(LoraplexError):  # it is in the outcome
            await ask(self._client, outcome, self._asking)

    def _num_done(self) -> int:
        return sum(outcome.ended is not None for outcome in self._outcomes)
