"""An engine and its fakes, for tests on an event loop.

The fake model's token is a function of the prompt's sum and the number of tokens so far, and a step
waits for a permit, so that a test says how far the engine thread may go.
"""

import asyncio
import functools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec

from loraplex.adapters.pool import AdapterPool
from loraplex.adapters.tiers import HostTier, Tier
from loraplex.engine.arena import Arena, Use
from loraplex.engine.engine import Engine, EngineConfig, EngineState, StepRecord
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import (
    BlendPart,
    Finished,
    SamplingParams,
    Sequence,
    StopParams,
)
from loraplex.engine.stream import TokenStream
from loraplex.errors import RequestError

from tests.server.engine.fakes import FakeLoader, FakeRunner, Packed, token_at

P = ParamSpec("P")


@dataclass
class Records:
    steps: list[StepRecord] = field(default_factory=list)
    states: list[EngineState] = field(default_factory=list)
    loads: list[tuple[str, str | None]] = field(default_factory=list)
    evictions: Counter[Tier] = field(default_factory=Counter)
    is_broken: bool = False

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_state(self, state: EngineState) -> None:
        if self.is_broken:
            raise OSError("the step log's disk is full")
        self.states.append(state)

    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None:
        assert seconds >= 0
        self.loads.append((digest, None if error is None else error.reason.name))

    def on_evictions(self, tier: Tier, count: int) -> None:
        self.evictions[tier] += count


class House:
    """An engine and its fakes."""

    def __init__(
        self,
        num_blocks: int = 200,
        max_live: int = 100,
        stream_limit: int = 5000,
        host_bytes: int = 100_000,
    ) -> None:
        self.arena = Arena(num_blocks)
        pool = AdapterPool(self.arena, num_slots=4)
        self.scheduler = Scheduler(self.arena, pool, SchedulerConfig(4, 16, 64))
        self.runner, self.loader, self.records = FakeRunner(), FakeLoader(), Records()
        self.host: HostTier[Packed] = HostTier(host_bytes)
        self.gate = self.runner.gate
        self.engine = Engine(
            self.scheduler,
            self.runner,
            self.loader,
            self.host,
            self.records,
            EngineConfig(max_live, stream_limit),
            clock=self.clock,
        )

    def clock(self) -> float:
        """The engine's."""
        return time.monotonic() + self.runner.pretended

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 5,
        digest: str | None = None,
        deadline: float | None = None,
    ) -> TokenStream:
        """A digest such as "a+b" is a blend."""
        stop = StopParams(max_tokens)
        name = f"my-{digest}" if digest else ""
        parts = digest.split("+") if digest and "+" in digest else []
        blend = tuple(BlendPart(version, 1 + index) for index, version in enumerate(parts))
        sequence = Sequence(request_id, prompt, SamplingParams(), stop, digest, name, blend)
        sequence.deadline = deadline
        return self.engine.submit(sequence)

    def steps_with(self, request_id: str) -> list[StepRecord]:
        return [step for step in self.records.steps if request_id in step.request_ids]

    async def hold_a_step(self) -> None:
        """With a step on the device; what is submitted now comes into the next one together."""
        self.gate.hold()
        self.submit("plug", [0], 1)
        await self.until(lambda: self.gate.is_waited_at)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def house(
    num_blocks: int = 200,
    max_live: int = 100,
    stream_limit: int = 5000,
    host_bytes: int = 100_000,
) -> AsyncIterator[House]:
    """However a test goes, afterwards the thread is gone and the memory is back."""
    built = House(num_blocks, max_live, stream_limit, host_bytes)
    built.engine.start()
    try:
        async with asyncio.timeout(20):
            yield built
    finally:
        built.gate.allow()
        await built.engine.stop()
    assert "loraplex-engine" not in {thread.name for thread in threading.enumerate()}
    built.scheduler.check_integrity()
    built.host.check_integrity()
    assert built.arena.count(Use.KV) == 0
    assert built.engine.num_live == 0


async def outcome(stream: TokenStream) -> tuple[list[int], str]:
    """The tokens, and the finish reason or the error's."""
    token_ids: list[int] = []
    try:
        async for event in stream:
            if isinstance(event, Finished):
                return token_ids, event.reason.value
            token_ids += event.token_ids
    except RequestError as error:
        return token_ids, error.reason.name
    raise AssertionError("the stream ended without an end")


def expected(prompt: list[int], max_tokens: int = 5) -> tuple[list[int], str]:
    return [token_at(prompt, position) for position in range(max_tokens)], "length"


def on_a_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run
