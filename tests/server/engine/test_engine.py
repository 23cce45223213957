"""The engine with a fake device: what each request gets, whatever the others do.

The fake model's token is a function of the prompt's sum and the number of tokens so far, and a step
waits for a permit, so that a test says how far the engine thread may go.
"""

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec

import pytest
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.engine import (
    MAX_FAILED_STEPS,
    Engine,
    EngineConfig,
    EngineState,
    StepRecord,
)
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import (
    Finished,
    FinishReason,
    SamplingParams,
    Sequence,
    StopParams,
    Tokens,
)
from loraplex.engine.stream import TokenStream
from loraplex.errors import RequestError

from tests.server.engine.fakes import (
    BROKEN,
    SICK,
    FakeLoader,
    FakeRunner,
    Packed,
    token_at,
)

P = ParamSpec("P")


@dataclass
class Records:
    steps: list[StepRecord] = field(default_factory=list)
    states: list[EngineState] = field(default_factory=list)
    loads: list[tuple[str, str | None]] = field(default_factory=list)
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


class House:
    """An engine and its fakes."""

    def __init__(
        self, num_blocks: int = 200, max_live: int = 100, stream_limit: int = 5000
    ) -> None:
        self.arena = Arena(num_blocks)
        pool = AdapterPool(self.arena, num_slots=4)
        self.scheduler = Scheduler(self.arena, pool, SchedulerConfig(4, 16, 64))
        self.runner, self.loader, self.records = FakeRunner(), FakeLoader(), Records()
        self.gate = self.runner.gate
        self.engine = Engine(
            self.scheduler,
            self.runner,
            self.loader,
            self.records,
            EngineConfig(max_live, stream_limit),
        )

    def submit(
        self, request_id: str, prompt: list[int], max_tokens: int = 5, digest: str | None = None
    ) -> TokenStream:
        stop = StopParams(max_tokens)
        name = f"my-{digest}" if digest else ""
        return self.engine.submit(
            Sequence(request_id, prompt, SamplingParams(), stop, digest, adapter_id=name)
        )

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
    num_blocks: int = 200, max_live: int = 100, stream_limit: int = 5000
) -> AsyncIterator[House]:
    """However a test goes, afterwards the thread is gone and the memory is back."""
    built = House(num_blocks, max_live, stream_limit)
    built.engine.start()
    try:
        async with asyncio.timeout(20):
            yield built
    finally:
        built.gate.allow()
        await built.engine.stop()
    assert "loraplex-engine" not in {thread.name for thread in threading.enumerate()}
    built.scheduler.check_integrity()
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


@on_a_loop
async def test_many_streams_in_a_small_arena() -> None:
    """Room for a fraction of them at a time, adapters come and go, some give way and come back."""
    async with house(num_blocks=24) as h:
        digests = [None, "a", "b", "c", "d", "e", "f"]
        requests = [
            (f"r{index}", [index] * (1 + index % 13), 3 + index % 20, digests[index % 7])
            for index in range(60)
        ]
        streams = [h.submit(*request) for request in requests]
        outcomes = await asyncio.gather(*map(outcome, streams))
        assert outcomes == [expected(prompt, n) for _, prompt, n, _ in requests]
        assert sum(step.num_preempted for step in h.records.steps) > 0
        assert len(h.records.loads) > 6
        assert h.records.states[-1].num_running == h.records.states[-1].num_waiting == 0


@on_a_loop
async def test_the_last_event_tells_how_it_went() -> None:
    async with house() as h:
        events = [event async for event in h.submit("r", [5, 6], 3)]
        assert all(isinstance(event, Tokens) for event in events[:-1])
        end = events[-1]
        assert isinstance(end, Finished)
        assert (end.reason, end.stop_token_id) == (FinishReason.LENGTH, None)
        assert min(end.timings.queue, end.timings.prefill, end.timings.decode) >= 0

        stop = StopParams(9, stop_token_ids=frozenset({token_at([5, 6], 1)}))
        stream = h.engine.submit(Sequence("s", [5, 6], SamplingParams(), stop))
        end = [event async for event in stream][-1]
        assert isinstance(end, Finished)
        assert (end.reason, end.stop_token_id) == (
            FinishReason.STOP_TOKEN,
            token_at([5, 6], 1),
        )


@on_a_loop
async def test_two_adapters_decode_in_one_step() -> None:
    async with house() as h:
        await h.hold_a_step()
        streams = [h.submit(f"r{digest}", [1], 20, digest) for digest in ("a", "b", None)]
        h.gate.allow()
        await asyncio.gather(*map(outcome, streams))
        mixed = [s for s in h.records.steps if set(s.digests) == {"a", "b", None}]
        assert len(mixed) >= 10
        assert {s.num_tokens for s in mixed} == {(1, 1, 1)}
        assert [s.number for s in h.records.steps] == [*range(1, len(h.records.steps) + 1)]
        assert all(h.engine.residency(digest) for digest in "ab")


@on_a_loop
async def test_after_an_abort_at_most_one_more_step() -> None:
    async with house() as h:
        await h.hold_a_step()
        h.submit("gone", [1], 1000)
        stays = h.submit("stays", [2], 12)
        h.gate.allow(4)
        await h.until(lambda: len(h.records.steps) == 4 and h.gate.is_waited_at)
        h.engine.abort("gone")
        h.engine.abort("gone")  # idempotent
        h.gate.allow()
        assert await outcome(stays) == expected([2], 12)
        assert len(h.steps_with("gone")) == 4  # the one that was under way
        await h.until(lambda: h.records.states[-1].kv_blocks == 0)
        assert h.engine.num_live == 0


@on_a_loop
async def test_a_request_id_is_free_again_at_once_and_gets_nothing_of_its_last_owner() -> None:
    async with house() as h:
        h.gate.hold()
        h.submit("x", [1], 1000)
        h.gate.allow(1)
        await h.until(lambda: len(h.records.steps) == 1 and h.gate.is_waited_at)
        with pytest.raises(RequestError, match="still running") as error:
            h.submit("x", [2])
        assert error.value.reason.name == "REQUEST_ID_IN_USE"
        h.engine.abort("x")  # while a step with it is on the device
        again = h.submit("x", [2])
        h.gate.allow()
        assert await outcome(again) == expected([2])
        assert await outcome(h.submit("x", [3])) == expected([3])


@on_a_loop
async def test_a_full_queue_refuses() -> None:
    async with house(max_live=2) as h:
        h.gate.hold()
        streams = [h.submit("a", [1]), h.submit("b", [2])]
        with pytest.raises(RequestError) as error:
            h.submit("c", [3])
        assert error.value.reason.name == "QUEUE_FULL"
        assert error.value.retry_after is not None
        h.gate.allow()
        assert await asyncio.gather(*map(outcome, streams)) == [expected([1]), expected([2])]
        assert await outcome(h.submit("c", [3])) == expected([3])


@on_a_loop
async def test_a_slow_reader_is_let_go() -> None:
    async with house(stream_limit=4) as h:
        slow = h.submit("slow", [1], 1000)
        await h.until(lambda: h.engine.num_live == 0)
        assert await outcome(slow) == (expected([1], 4)[0], "SLOW_READER")
        await h.until(lambda: h.records.states[-1].kv_blocks == 0)


@on_a_loop
async def test_logits_that_are_not_finite_name_the_adapter() -> None:
    async with house() as h:
        await h.hold_a_step()
        streams = [
            h.submit("adapted", [SICK], digest="a"),
            h.submit("base", [SICK]),
            h.submit("well", [1], digest="a"),
        ]
        h.gate.allow()
        with pytest.raises(RequestError, match="adapter my-a") as error:
            await anext(aiter(streams[0]))
        assert error.value.reason.name == "NAN_LOGITS"
        with pytest.raises(RequestError, match="the base model"):
            await anext(aiter(streams[1]))
        assert await outcome(streams[2]) == expected([1])


@on_a_loop
async def test_a_failed_step_costs_its_requests_only(caplog: pytest.LogCaptureFixture) -> None:
    async with house() as h:
        await h.hold_a_step()
        h.loader.instant = False
        bad = h.submit("bad", [BROKEN])
        beside = h.submit("beside", [1])
        later = h.submit("later", [2], digest="a")  # not in that step: its adapter is awaited
        h.gate.allow()
        assert await outcome(bad) == ([], "INTERNAL")
        assert (await outcome(beside))[1] == "INTERNAL"
        h.loader.reads["a"].set_result(Packed("a"))
        assert await outcome(later) == expected([2])
    assert "the device is on fire" in caplog.text


@on_a_loop
async def test_a_device_that_always_fails_ends_the_engine() -> None:
    h = House()
    h.engine.start()
    async with asyncio.timeout(20):
        for index in range(MAX_FAILED_STEPS):
            assert not h.engine.crashed.is_set()
            assert await outcome(h.submit(f"r{index}", [BROKEN])) == ([], "INTERNAL")
        await h.engine.crashed.wait()
        await h.engine.stop()


@on_a_loop
async def test_loading_does_not_stall_the_others() -> None:
    async with house() as h:
        h.loader.instant = False
        waiting = h.submit("waiting", [1], digest="slow")
        for index in range(3):
            assert await outcome(h.submit(f"r{index}", [index])) == expected([index])
        assert not h.engine.residency("slow")
        assert h.steps_with("waiting") == []
        h.loader.reads["slow"].set_result(Packed("slow"))
        assert await outcome(waiting) == expected([1])
        assert waiting.timings().adapter_wait > 0
        assert h.records.loads == [("slow", None)]


@on_a_loop
async def test_an_adapter_read_for_nobody_is_let_go() -> None:
    async with house() as h:
        h.loader.instant = False
        h.submit("gone", [1], digest="a")
        await h.until(lambda: "a" in h.loader.reads)
        h.engine.abort("gone")
        packed = Packed("a")
        alive = weakref.ref(packed)
        h.loader.reads.pop("a").set_result(packed)
        del packed
        await h.until(lambda: alive() is None)

        again = h.submit("again", [1], digest="a")
        await h.until(lambda: "a" in h.loader.reads)
        h.loader.reads["a"].set_result(Packed("a"))
        assert await outcome(again) == expected([1])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RequestError("ADAPTER_UNUSABLE", "it is damaged"), "ADAPTER_UNUSABLE"),
        (OSError("no such file"), "INTERNAL"),
    ],
)
@on_a_loop
async def test_a_failed_read_reaches_those_who_wait_for_it(error: Exception, reason: str) -> None:
    async with house() as h:
        h.loader.instant = False
        first, second = h.submit("1", [1], digest="bad"), h.submit("2", [1], digest="bad")
        other = h.submit("3", [3], digest="good")
        await h.until(lambda: len(h.loader.reads) == 2)
        h.loader.reads["bad"].set_exception(error)
        assert await outcome(first) == await outcome(second) == ([], reason)
        h.loader.reads["good"].set_result(Packed("good"))
        assert await outcome(other) == expected([3])
        assert sorted(h.records.loads) == [("bad", reason), ("good", None)]

        again = h.submit("1", [1], digest="bad")  # the next request tries anew
        await h.until(lambda: not h.loader.reads["bad"].done())
        h.loader.reads["bad"].set_result(Packed("bad"))
        assert await outcome(again) == expected([1])


@on_a_loop
async def test_a_failed_copy_gives_its_room_back() -> None:
    async with house() as h:
        assert await outcome(h.submit("1", [1], digest="uncopyable")) == ([], "INTERNAL")
        assert await outcome(h.submit("2", [2])) == expected([2])
        assert h.records.states[-1].adapter_blocks == 0


@on_a_loop
async def test_what_never_fits_is_told_so() -> None:
    async with house(num_blocks=4) as h:
        assert await outcome(h.submit("long", [1] * 17)) == ([], "EXCEEDS_KV_CAPACITY")
        tokens, reason = await outcome(h.submit("grows", [1] * 10, 1000, digest="a"))
        assert (tokens, reason) == ([], "EXCEEDS_KV_CAPACITY")
        tokens, reason = await outcome(h.submit("grows", [1] * 7, 1000, digest="a"))
        assert (tokens, reason) == (expected([1] * 7, 2)[0], "OUT_OF_MEMORY")
        assert await outcome(h.submit("short", [1])) == expected([1])


@on_a_loop
async def test_stop_ends_every_stream_and_the_thread() -> None:
    async with house() as h:
        h.loader.instant = False
        await h.hold_a_step()
        streams = [h.submit("running", [1], 500), h.submit("waiting", [1], digest="a")]
        h.gate.allow(4)
        await h.until(lambda: len(h.records.steps) == 4 and h.gate.is_waited_at)
        stopping = asyncio.create_task(h.engine.stop())
        await asyncio.sleep(0)
        h.gate.allow()  # the step under way is let finish
        await stopping
        assert len(h.records.steps) == 5
        assert [(await outcome(stream))[1] for stream in streams] == ["DRAINING"] * 2
        with pytest.raises(RequestError) as error:
            h.submit("late", [1])
        assert error.value.reason.name == "DRAINING"
        h.loader.reads["a"].set_result(Packed("a"))  # too late, and nobody minds


@on_a_loop
async def test_an_engine_that_fails_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    h = House()
    h.engine.start()
    async with asyncio.timeout(20):
        await h.hold_a_step()
        streams = [h.submit("running", [1]), h.submit("waiting", [1], digest="a")]
        h.records.is_broken = True
        h.gate.allow()
        await h.engine.crashed.wait()
        assert [(await outcome(stream))[1] for stream in streams] == ["INTERNAL"] * 2
        with pytest.raises(RequestError):
            h.submit("late", [1])
        await h.engine.stop()
    assert "disk is full" in caplog.text
