"""Clients that each send their next request when the last one is answered."""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Protocol

from child import first_error
from loraplex_client import AsyncClient
from outcome import Asking, Outcome, ask
from workload import Request


class Load(Protocol):
    """What is to be asked, and by which of the clients next."""

    def next(self, client: int) -> Request | None:
        """None: this client is done."""

    def done(self, request: Request) -> None:
        """Its answer is complete."""


class Clients:
    """So many closed loops over one connection. `outcomes` grows, in the order of sending."""

    def __init__(self, client: AsyncClient, number: int) -> None:
        self._client = client
        self._number = number
        self.outcomes: list[Outcome] = []

    async def run(self, load: Load) -> list[Outcome]:
        """Until the load ends; the outcomes of this run.

        A request that fails ends it: of several errors the first one is raised.
        """
        first = len(self.outcomes)
        try:
            async with asyncio.TaskGroup() as group:
                for client in range(self._number):
                    group.create_task(self._loop(client, load))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        return self.outcomes[first:]

    async def _loop(self, client: int, load: Load) -> None:
        while (request := load.next(client)) is not None:
            outcome = Outcome(request, due=time.monotonic())
            self.outcomes.append(outcome)
            await ask(self._client, outcome, Asking())
            load.done(request)


async def stop(running: "asyncio.Task[list[Outcome]]") -> None:
    """Leave the streams where they are; if they ended by an error, that comes out here."""
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


class Prompts:
    """Random prompts, none like another: no prefix cache has anything to give."""

    def __init__(self, vocab_size: int, num_tokens: int, seed: int) -> None:
        self._vocab_size = vocab_size
        self._num_tokens = num_tokens
        self._rng = random.Random(f"prompts {seed}")

    def next(self) -> tuple[int, ...]:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(self._num_tokens))


def pauses_within(
    outcomes: Iterable[Outcome], windows: Sequence[tuple[float, float]]
) -> list[float]:
    """Seconds of every pause between two deltas of a stream that reaches into a window."""
    return [
        after - before
        for outcome in outcomes
        for before, after in pairwise(outcome.arrivals)
        if any(before < end and after > begin for begin, end in windows)
    ]


def tokens_within(outcomes: Iterable[Outcome], begin: float, end: float) -> int:
    """How many arrived then."""
    return sum(outcome.tokens_between(begin, end) for outcome in outcomes)
