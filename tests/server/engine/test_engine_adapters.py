"""Adapters and the engine's thread: they come, are mixed, pinned and forgotten while it steps."""

import asyncio

import pytest
from loraplex.adapters.tiers import Tier
from loraplex.engine.arena import Use
from loraplex.errors import RequestError

from tests.server.engine.fakes import Packed
from tests.server.engine.house import House, expected, house, on_a_loop, outcome

ADAPTERS = [None, "a", "b", "c", "d", "e", "f", "a+b", "d+e+f"]


@on_a_loop
async def test_many_streams_in_a_small_arena() -> None:
    """Room for a fraction of them at a time, adapters come and go, some give way and come back."""
    async with house(num_blocks=24, host_bytes=300) as h:
        requests = [
            (f"r{index}", [index] * (1 + index % 13), 3 + index % 20, ADAPTERS[index % 9])
            for index in range(90)
        ]
        streams = [h.submit(*request) for request in requests]
        outcomes = await asyncio.gather(*map(outcome, streams))
        assert outcomes == [expected(prompt, n) for _, prompt, n, _ in requests]
        assert sum(step.num_preempted for step in h.records.steps) > 0
        assert len(h.records.loads) > 6
        assert h.records.evictions[Tier.DEVICE] > 0
        assert h.records.evictions[Tier.HOST] > 0
        await h.engine.check_integrity()
        await h.until(lambda: h.records.states[-1].num_running == 0)
        state = h.records.states[-1]
        assert (state.num_waiting, state.kv_blocks) == (0, 0)
        assert state.resident_adapters * 2 == state.adapter_blocks
        assert state.host_adapters <= 3


@on_a_loop
async def test_blends_and_their_members_in_one_step() -> None:
    async with house() as h:
        await h.hold_a_step()
        digests = ["a", "b", "a+b", "b+a", None]
        streams = [h.submit(f"r{digest}", [1], 20, digest) for digest in digests]
        h.gate.allow()
        assert await asyncio.gather(*map(outcome, streams)) == [expected([1], 20)] * 5
        assert any(set(step.digests) == set(digests) for step in h.records.steps)
        assert sorted(h.records.loads) == [("a", None), ("b", None)]


@on_a_loop
async def test_an_adapter_that_comes_soon_joins_the_very_step_that_sent_for_it() -> None:
    """Against steps of 100 s each, any real load is soon."""
    async with house() as h:
        h.runner.seconds = 100.0
        await h.hold_a_step()
        runs = h.submit("runs", [1], 20)
        h.gate.allow(2)
        await h.until(lambda: len(h.records.steps) == 2 and h.gate.is_waited_at)
        h.loader.instant = False
        joins, late = h.submit("joins", [2], 3, "a+b"), h.submit("late", [3], 3)
        h.gate.allow(1)
        await h.until(lambda: h.loader.reads.keys() == {"a", "b"})
        h.submit("gone", [4], 3, "a")
        h.engine.abort("gone")
        for version in "ab":
            h.loader.reads[version].set_result(Packed(version))
        h.gate.allow()
        assert await asyncio.gather(*map(outcome, (runs, joins, late))) == [
            expected([1], 20),
            expected([2], 3),
            expected([3], 3),
        ]
        assert set(h.records.steps[3].request_ids) == {"runs", "joins", "late"}
        assert h.steps_with("gone") == []


@on_a_loop
async def test_the_place_of_a_version() -> None:
    async with house(num_blocks=4) as h:
        assert h.engine.residency("a") is Tier.DISK
        await outcome(h.submit("1", [1], digest="a"))
        assert h.engine.residency("a") is Tier.DEVICE
        await outcome(h.submit("2", [1] * 12))  # takes its room
        assert h.engine.residency("a") is Tier.HOST
        h.engine.forget("a")
        await h.engine.check_integrity()
        assert h.engine.residency("a") is Tier.DISK


@on_a_loop
async def test_a_forgotten_version_serves_those_who_have_it_to_their_end() -> None:
    async with house() as h:
        await outcome(h.submit("first", [1], digest="a"))
        await h.hold_a_step()
        last = h.submit("last", [1], 20, "a")
        h.gate.allow(3)
        await h.until(lambda: len(h.steps_with("last")) == 2)
        h.engine.forget("a")
        h.gate.allow()
        assert await outcome(last) == expected([1], 20)
        await h.engine.check_integrity()
        assert h.engine.residency("a") is Tier.DISK
        assert h.records.states[-1].adapter_blocks == 0


@on_a_loop
async def test_what_is_pinned_stays_on_the_device() -> None:
    async with house(num_blocks=6) as h:
        await h.engine.pin("a", "name")
        await h.until(lambda: h.engine.residency("a") is Tier.DEVICE)
        await h.engine.pin("a", "name")  # idempotent
        with pytest.raises(RequestError) as error:
            await h.engine.pin("b", "other")
        assert error.value.reason.name == "PINS_EXCEED_MEMORY"
        assert await outcome(h.submit("long", [1] * 17)) == ([], "OUT_OF_MEMORY")
        assert await outcome(h.submit("other", [1] * 4, digest="c")) == expected([1] * 4)
        assert h.engine.residency("a") is Tier.DEVICE
        h.engine.unpin("a", "name")
        h.engine.unpin("a", "name")
        h.engine.unpin("unknown", "name")
        assert await outcome(h.submit("long", [1] * 17)) == expected([1] * 17)
        assert h.engine.residency("a") is Tier.HOST


@on_a_loop
async def test_a_pin_whose_caller_went_away() -> None:
    async with house() as h:
        h.loader.instant = False
        pinning = asyncio.create_task(h.engine.pin("a", "name"))
        await h.until(lambda: "a" in h.loader.reads)
        pinning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pinning
        h.engine.unpin("a", "name")
        h.loader.reads["a"].set_result(Packed("a"))
        await h.engine.check_integrity()
        assert not h.scheduler.pool.is_pinned("a")


@on_a_loop
async def test_a_pin_that_waits_ends_with_the_engine() -> None:
    async with house() as h:
        h.loader.instant = False
        pinning = asyncio.create_task(h.engine.pin("a", "name"))
        await h.until(lambda: "a" in h.loader.reads)
        await h.engine.stop()
        for ending in (pinning, h.engine.pin("b", "name")):
            with pytest.raises(RequestError) as error:
                await ending
            assert error.value.reason.name == "DRAINING"
        h.engine.unpin("a", "name")
        h.engine.forget("a")


@on_a_loop
async def test_books_that_do_not_add_up_are_told() -> None:
    h = House()
    h.engine.start()
    await h.engine.check_integrity()
    h.arena.allocate(1, Use.KV)
    with pytest.raises(AssertionError, match="KV blocks and running sequences disagree"):
        await h.engine.check_integrity()
    await h.engine.stop()
