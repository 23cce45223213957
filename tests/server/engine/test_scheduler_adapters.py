"""Whose adapter is brought to the device, in whose place, and what waits for it meanwhile."""

import pytest
from loraplex.adapters.pool import Room
from loraplex.engine.sequence import Phase

from tests.server.engine.rig import Rig


def rig_with_blend() -> Rig:
    """One sequence runs with a blend of x in slot 0 and y in slot 1."""
    rig = Rig(num_slots=3)
    for digest in "xy":
        rig.resident(digest)
    rig.add("one", 2, "xy", max_tokens=2)
    assert rig.step() == "one:0+2*, bind 0+1"
    return rig


# Reading.


def test_adapters_are_asked_for_at_arrival_the_most_wanted_first() -> None:
    rig = Rig(max_running=1)
    rig.add("running", 2)
    rig.step()
    for name, digest in enumerate("abcbdc"):
        rig.add(str(name), 2, digest)
    # The first in the queue is served first whatever the others want, so that it cannot starve.
    assert rig.step() == "running:2+1*, need a, want b, want c, want d"
    rig.add("6", 2, "c")
    assert rig.step({"a": 2}) == "running:3+1*, load a, want c, want b, want d"
    rig.loaded("a")
    assert rig.step({"c": 200}) == "running:4+1*, want b, want d"


def test_nobody_asks_any_more() -> None:
    rig = Rig()
    gone = rig.add("gone", 2, "a")
    rig.add("stays", 2, "b")
    rig.scheduler.abort(gone)
    assert rig.step() == "need b"
    assert rig.scheduler.awaited == ["b"]
    assert rig.scheduler.is_awaited("b")
    assert not rig.scheduler.is_awaited("a")


def test_the_wait_for_an_adapter_ends_when_it_is_there() -> None:
    rig = Rig(max_running=2)
    rig.resident("x")
    for name in ("r1", "r2"):
        rig.add(name, 2)
    rig.step()
    rig.add("had it", 2, "x")
    rig.add("waits", 2, "xy")
    assert rig.step({"y": 1}) == "r1:2+1*, r2:2+1*, load y"
    rig.now = 7.0
    rig.loaded("y")
    ready_at = {s.request_id: s.adapter_ready_at for s in rig.scheduler.waiting}
    assert ready_at == {"had it": 1.0, "waits": 7.0}


def test_one_that_gave_way_waits_for_memory_and_not_for_its_adapter() -> None:
    rig = Rig(num_blocks=8)
    rig.add("old", 8, max_tokens=60)
    rig.resident("x")
    new = rig.add("new", 8, "x", max_tokens=60)
    while new.phase is Phase.RUNNING or not new.output_token_ids:
        rig.step()
    while rig.pool.get("x") is not None:
        rig.step()
    assert new.phase is Phase.WAITING
    assert new.adapter_ready_at == new.submitted_at


# Room.


def test_what_an_earlier_one_waits_for_is_not_taken_for_a_later_one() -> None:
    rig = Rig(num_blocks=10)
    for digest in "xy":
        rig.resident(digest, 3)
    rig.add("first", 2, "xz")  # z is being read
    rig.add("second", 2, "a")
    assert rig.step({"a": 5}) == "load a, need z, evict"
    assert rig.residents() == "ax"  # y went, although x was used longer ago


def test_nothing_goes_where_it_would_not_do() -> None:
    rig = Rig(num_blocks=10, num_slots=4)
    rig.resident("x", 3)
    rig.add("long", 28)
    assert rig.step() == "long:0+28*"
    rig.add("wants y", 2, "y")
    assert rig.step({"y": 4}) == "long:28+1*, evict"  # a block for the one that runs
    rig.resident("x", 1)
    assert rig.step({"y": 4}) == "long:29+1*"
    assert rig.residents() == "x"


def test_one_that_lost_its_adapter_to_those_that_run_is_overtaken_no_more() -> None:
    rig = Rig(num_blocks=4)
    robbed = rig.add("robbed", 5, "x")
    assert rig.step({"x": 2}) == "load x"
    rig.add("runs", 8)
    assert rig.step({"x": 2}) == "runs:0+8*"
    rig.loaded("x")
    assert rig.step() == "runs:8+1*, need x, evict"
    assert not robbed.is_overtakable
    rig.add("late", 1)
    assert rig.steps(2) == ["runs:9+1*, need x", "runs:10+1*, need x"]
    rig.scheduler.abort(rig.scheduler.running[0])
    assert rig.step({"x": 2}) == "load x"
    rig.loaded("x")
    assert rig.step({"x": 2}) == "robbed:0+5*"
    # It waited for its adapter until it came for the second time.
    assert robbed.timings(rig.now).adapter_wait == robbed.adapter_ready_at == 6.0


def test_adapters_of_those_who_wait_for_a_place_come_ahead() -> None:
    rig = Rig(num_blocks=10, max_running=2)
    rig.resident("idle", 2)
    for name in ("r1", "r2"):
        rig.add(name, 2)
    rig.step()
    for name, digest in zip(("q1", "q2", "q3"), "xyz", strict=True):
        rig.add(name, 4, digest)
    sizes = dict.fromkeys("xyz", 3)
    # Of 10 blocks 2 are KV, and 2 more are left for those to grow into. q1 takes 3, and later on 1
    # for its KV; then there are 2 for q2, who would need 3.
    assert rig.step(sizes) == "r1:2+1*, r2:2+1*, load x"
    rig.loaded("x")
    assert rig.step(sizes) == "r1:3+1*, r2:3+1*"
    rig.scheduler.abort(rig.scheduler.running[0])
    assert rig.step(sizes) == "r2:4+1*, q1:0+4*"
    rig.scheduler.abort(rig.scheduler.running[0])
    assert rig.step(sizes) == "q1:4+1*, load y"
    assert rig.residents() == "xy"
    assert rig.pool.get("idle") is not None


def test_nothing_comes_ahead_past_one_that_waits_for_memory() -> None:
    rig = Rig(num_blocks=6)
    rig.add("a", 12)
    rig.step()
    rig.add("big", 16)
    rig.add("later", 2, "x")
    assert rig.step({"x": 1}) == "a:12+1*"


# Blends.


def test_a_blend_is_bound_when_all_its_members_are_there() -> None:
    rig = Rig()
    blend = rig.add("blend", 2, "xy")
    assert rig.step() == "need x, need y"
    assert rig.step({"y": 2}) == "load y, need x"
    assert rig.step({"x": 2}) == "load x"
    rig.loaded("x")
    assert rig.step() == ""
    rig.loaded("y")
    assert rig.step() == "blend:0+2*, bind 1+0"
    assert blend.slot == 2
    assert rig.pool.references() == {"x": 1, "y": 1, "xy": 1}


def test_a_blend_is_bound_once_for_all_who_use_it() -> None:
    rig = rig_with_blend()
    rig.add("two", 2, "xy", max_tokens=1)
    assert rig.step() == "one:2+1*, two:0+2*"
    rig.add("three", 2, "xy")
    assert rig.step() == "three:0+2*"


def test_an_idle_blend_gives_way_before_its_members() -> None:
    rig = rig_with_blend()
    rig.step()
    rig.add("z", 2, "z")
    assert rig.step({"z": 2}) == "load z"
    assert rig.residents() == "xyz"
    assert rig.pool.get("xy") is None
    rig.loaded("z")
    assert rig.step() == "z:0+2*"


@pytest.mark.parametrize(
    ("num_slots", "pinned", "expected"),
    [
        (3, "", "load x, load y"),
        (2, "", "fail r EXCEEDS_KV_CAPACITY"),  # a slot is the blend's own
        (3, "x", "load x, load y"),
        (3, "z", "fail r OUT_OF_MEMORY"),  # which a pin less would mend
    ],
)
def test_a_blend_of_more_than_there_are_slots(num_slots: int, pinned: str, expected: str) -> None:
    rig = Rig(num_slots=num_slots)
    for digest in pinned:
        rig.pinned(digest, 2)
    rig.add("r", 2, "xy")
    assert rig.step({"x": 2, "y": 2, "z": 2}).removeprefix("load z, ") == expected


# Pins.


def test_a_pinned_adapter_comes_first_and_holds_back_the_queue() -> None:
    rig = Rig(num_blocks=10)
    rig.add("runs", 22, max_tokens=3)
    rig.step()
    rig.pinned("p", 5)
    rig.add("waits", 2, "x")
    assert rig.step() == "runs:22+1*, need p, need x"
    assert rig.step({"p": 5, "x": 1}) == "runs:23+1*"  # no room for p, and none is given to x
    assert rig.step({"p": 5, "x": 1}) == "load p, load x"
    rig.loaded("p")
    assert rig.pool.make_room(6) is None


@pytest.mark.parametrize(
    ("num_prompt", "digest", "expected"),
    [
        (20, None, "r:0+20*"),
        (21, None, "fail r OUT_OF_MEMORY"),
        (40, None, "fail r OUT_OF_MEMORY"),
        (41, None, "fail r EXCEEDS_KV_CAPACITY"),
        (12, "x", "load x"),
        (13, "x", "fail r OUT_OF_MEMORY"),
        (32, "x", "fail r OUT_OF_MEMORY"),
        (33, "x", "fail r EXCEEDS_KV_CAPACITY"),
        (20, "p", "r:0+20*"),  # its own pin is counted once
        (21, "p", "fail r EXCEEDS_KV_CAPACITY"),
    ],
)
def test_what_never_fits_beside_the_pins_is_refused(
    num_prompt: int, digest: str | None, expected: str
) -> None:
    rig = Rig(num_blocks=10)
    rig.pinned("p", 5)
    rig.resident("p", 5)
    rig.add("r", num_prompt, digest)
    assert rig.step({"x": 2}) == expected


@pytest.mark.parametrize(
    ("num_slots", "pinned", "num_prompt", "message"),
    [
        (3, "z", 2, "the pinned adapters leave too few slots (--max-slots) for"),
        (8, "z", 20, "the pinned adapters leave too little memory (--memory) for"),
        (2, "", 2, "the blend takes 3 slots, one of them its own; there are 2 (--max-slots)"),
        (8, "", 40, "the prompt and its adapters are larger than the memory"),
    ],
)
def test_a_refusal_says_what_is_short(
    num_slots: int, pinned: str, num_prompt: int, message: str
) -> None:
    rig = Rig(num_blocks=10, num_slots=num_slots)
    for digest in pinned:
        rig.pinned(digest, 2)
    rig.add("r", num_prompt, "xy")
    ((_, error),) = rig.schedule({"x": 2, "y": 2}).failed
    assert error.message.startswith(message)
    assert (error.retry_after is not None) == bool(pinned)


def test_one_that_had_begun_and_fits_no_more_is_told_so() -> None:
    rig = Rig(num_blocks=10)
    old = rig.add("old", 8)
    new = rig.add("new", 20, max_tokens=9)
    rig.step()
    for _ in range(5):
        rig.step()
    rig.pinned("p", 5)
    while new.phase is Phase.RUNNING:
        rig.step()
    assert new.phase is Phase.WAITING
    rig.scheduler.abort(old)
    assert rig.step({"p": 5}) == "load p, fail new OUT_OF_MEMORY"


def test_sight() -> None:
    rig = Rig(num_blocks=10)
    rig.resident("x")
    rig.add("a", 2, "x")
    rig.step()
    rig.add("b", 2, "y")
    assert rig.pool.room(()) == Room(7, 3)
    assert repr(rig.scheduler) == (
        "Scheduler(running [a:2], waiting [b], Arena(10 blocks: 1 kv, 2 adapter, 7 free), "
        "AdapterPool(1/4: x@0x1))"
    )
