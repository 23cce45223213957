"""Clients that each send their next request when the last one is answered."""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

from figures import Arrival
from loraplex_client import AsyncClient, Delta, Finished, Timings


class Ask(NamedTuple):
    """One request: greedy, of exactly so many tokens."""

    prompt: tuple[int, ...]
    adapter: str | None  # None: the bare base
    max_tokens: int


@dataclass(slots=True)
class Answer:
    """One request's course, on `time.monotonic`. Grows while its tokens arrive."""

    ask: Ask
    sent: float
    arrivals: list[Arrival] = field(default_factory=list)  # `seconds` on the same clock
    timings: Timings | None = None  # the server's, once it has finished

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals[0].seconds - self.sent


class Load(Protocol):
    """What is to be asked, and by which of the clients next."""

    def next(self, client: int) -> Ask | None:
        """None: this client is done."""

    def done(self, ask: Ask) -> None:
        """Its answer is complete."""


class Clients:
    """So many closed loops over one connection. `answers` grows, in the order of sending."""

    def __init__(self, client: AsyncClient, number: int) -> None:
        self._client = client
        self._number = number
        self.answers: list[Answer] = []

    async def run(self, load: Load) -> list[Answer]:
        """Until the load ends; the answers of this run."""
        first = len(self.answers)
        async with asyncio.TaskGroup() as group:
            for client in range(self._number):
                group.create_task(self._loop(client, load))
        return self.answers[first:]

    async def _loop(self, client: int, load: Load) -> None:
        while (ask := load.next(client)) is not None:
            answer = Answer(ask, time.monotonic())
            self.answers.append(answer)
            await self._stream(answer)
            load.done(ask)

    async def _stream(self, answer: Answer) -> None:
        ask = answer.ask
        async for event in self._client.stream(
            token_ids=ask.prompt,
            adapter_id=ask.adapter or "",
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            temperature=0.0,
            repetition_penalty=1.0,
        ):
            if isinstance(event, Delta) and event.token_ids:
                answer.arrivals.append(Arrival(time.monotonic(), len(event.token_ids)))
            elif isinstance(event, Finished):
                answer.timings = event.timings


async def stop(running: "asyncio.Task[list[Answer]]") -> None:
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


def pauses_within(answers: Iterable[Answer], windows: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of every pause between two deltas of a stream that reaches into a window."""
    return [
        after.seconds - before.seconds
        for answer in answers
        for before, after in pairwise(answer.arrivals)
        if any(before.seconds < end and after.seconds > begin for begin, end in windows)
    ]


def tokens_within(answers: Iterable[Answer], begin: float, end: float) -> int:
    """How many arrived then."""
    return sum(
        arrival.num_tokens
        for answer in answers
        for arrival in answer.arrivals
        if begin <= arrival.seconds < end
    )
