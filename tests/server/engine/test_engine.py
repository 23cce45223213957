"""The engine with a fake device: what each request gets, whatever the others do."""

import asyncio
import weakref

import pytest
from loraplex.adapters.tiers import Tier
from loraplex.engine.engine import MAX_FAILED_STEPS
from loraplex.engine.sequence import (
    Finished,
    FinishReason,
    SamplingParams,
    Sequence,
    StopParams,
    Tokens,
)
from loraplex.errors import RequestError

from tests.server.engine.fakes import BROKEN, SICK, Packed, token_at
from tests.server.engine.house import House, expected, house, on_a_loop, outcome


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
        assert {h.engine.residency(digest) for digest in "ab"} == {Tier.DEVICE}


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
async def test_places_in_the_queue_come_back_however_a_request_ends() -> None:
    async with house(max_live=4, stream_limit=20) as h:
        h.loader.instant = False
        for _ in range(3):
            await h.hold_a_step()
            streams = [h.submit("ends", [1]), h.submit("sick", [SICK])]
            h.submit("gone", [1], digest="a")
            with pytest.raises(RequestError):
                h.submit("one too many", [1])
            h.engine.abort("gone")
            h.submit("gone", [1], 1000)
            h.gate.allow()
            await asyncio.gather(*map(outcome, streams))
            await h.until(lambda: h.engine.num_live == 0)  # nobody reads the last one


@on_a_loop
async def test_a_deadline_is_seen_at_submit_and_while_a_request_waits() -> None:
    async with house() as h:
        await h.hold_a_step()
        with pytest.raises(RequestError) as error:
            h.submit("past", [1], deadline=h.clock() - 1)
        assert error.value.reason.name == "DEADLINE_EXCEEDED"
        h.loader.instant = False
        waits = h.submit("waits", [1], digest="a", deadline=h.clock() + 5)
        runs = h.submit("runs", [1], 4)
        h.runner.seconds = 4.0  # of which the engine really waits a part for the adapter
        h.gate.allow()
        assert await outcome(waits) == ([], "DEADLINE_EXCEEDED")
        assert await outcome(runs) == expected([1], 4)


@on_a_loop
async def test_a_deadline_that_the_queue_puts_out_of_reach_is_refused() -> None:
    async with house(max_live=500) as h:
        h.runner.seconds = 1.0  # pretended
        await asyncio.gather(*(outcome(h.submit(f"r{index}", [1] * 8)) for index in range(64)))
        await h.hold_a_step()
        for index in range(200):
            h.submit(f"q{index}", [1] * 8)
        with pytest.raises(RequestError) as error:
            h.submit("late", [1] * 8, deadline=h.clock() + 2)
        assert error.value.reason.name == "DEADLINE_UNREACHABLE"
        h.submit("in time", [1] * 8, deadline=h.clock() + 1000)
        h.submit("another's turn comes soon", [1], digest="a", deadline=h.clock() + 20)
        for request_id in [f"q{index}" for index in range(200)]:
            h.engine.abort(request_id)
        h.gate.allow()
        await h.until(lambda: h.engine.num_live == 0)


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
        assert h.engine.residency("slow") is Tier.DISK
        assert h.steps_with("waiting") == []
        h.loader.reads["slow"].set_result(Packed("slow"))
        assert await outcome(waiting) == expected([1])
        assert waiting.timings().adapter_wait > 0
        assert h.records.loads == [("slow", None)]


@on_a_loop
async def test_an_adapter_read_for_nobody_is_let_go() -> None:
    async with house(host_bytes=0) as h:
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
