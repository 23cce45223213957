"""Priorities, shares of places and of a step's tokens, deadlines; each case by a few steps."""

from weakref import ref

import pytest
from loraplex.engine.admission import HEADROOM_STEPS
from loraplex.engine.displacement import MAX_DISPLACED, MAX_LEAD
from loraplex.engine.fair_share import CREDIT
from loraplex.engine.pace import Pace
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import BlendPart, Client, Phase, SamplingParams, Sequence, StopParams
from loraplex.engine.step import load_of

from tests.server.engine.rig import Rig


def charge(rig: Rig, digest: str, amount: float) -> None:
    """As if the client had been served so much."""
    rig.scheduler.roster.fair.charge(("", (digest,)), int(amount), 0)


def served(scheduler: Scheduler, client: Client) -> float:
    return scheduler.roster.fair.counters[client]


def crowd(max_running: int = 4) -> tuple[Rig, list[Sequence]]:
    """All places taken by x, and y's adapter here as well."""
    rig = Rig(max_running=max_running)
    for digest in "xy":
        rig.resident(digest)
    running = [rig.add(f"x{index}", 2, "x") for index in range(max_running)]
    rig.step()
    return rig, running


# Order.


def test_the_client_served_least_goes_first_and_each_in_its_order() -> None:
    rig = Rig(max_running=1)
    for digest in "xy":
        rig.resident(digest)
    rig.add("busy", 2, max_tokens=1)
    for name in ("x1", "x2", "y1", "y2"):
        rig.add(name, 4, name[0], max_tokens=1)
    charge(rig, "x", 2000)
    assert [rig.step() for _ in range(5)] == [
        f"{n}*" for n in ("busy:0+2", "y1:0+4", "y2:0+4", "x1:0+4", "x2:0+4")
    ]


def test_of_clients_served_alike_the_one_whose_adapter_runs_goes_first() -> None:
    rig = Rig(max_running=2)
    for digest in "xy":
        rig.resident(digest)
    rig.add("y1", 2, "y")
    rig.step()
    rig.add("x1", 2, "x")
    rig.add("y2", 2, "y")
    assert rig.step() == "y1:2+1*, y2:0+2*"
    rig, _ = crowd(max_running=2)  # but not beyond a bound
    charge(rig, "x", 600)
    rig.add("x9", 2, "x")
    rig.add("y9", 2, "y")
    rig.scheduler.abort(rig.scheduler.running[0])
    assert rig.step() == "x1:2+1*, y9:0+2*"


def test_a_higher_priority_goes_before_any_share() -> None:
    rig = Rig(max_running=1)
    rig.resident("x")
    rig.add("low", 2, priority=-1, max_tokens=1)
    rig.add("usual", 2, max_tokens=1)
    rig.add("high", 2, "x", priority=5, max_tokens=1)
    charge(rig, "x", 100_000)
    assert rig.steps(3) == ["high:0+2*", "usual:0+2*", "low:0+2*"]


# Tokens of a step.


def test_a_long_prompt_leaves_tokens_to_another_clients_short_one() -> None:
    rig = Rig(num_blocks=300, max_step_tokens=64)
    rig.resident("x")
    rig.add("long", 400)
    assert rig.step() == "long:0+64"
    rig.add("short", 20, "x")
    assert rig.step() == "long:64+44, short:0+20*"
    rig.add("second", 20)  # the long one's own client waits for it
    assert rig.step() == "short:20+1*, long:108+63"


def test_a_prompt_of_a_higher_priority_has_the_step_first() -> None:
    rig = Rig(num_blocks=300, max_step_tokens=64)
    rig.add("long", 400)
    rig.step()
    rig.add("high", 100, priority=1)
    assert rig.step() == "high:0+64"
    assert rig.step() == "high:64+36*, long:64+28"


def paced_step(rig: Rig) -> int:
    """Tokens of prompts in one more step, of which a token costs as much as a stream."""
    decided = rig.schedule()
    load = load_of(decided.rows)
    rig.scheduler.learn(decided, 0.01 + 0.001 * (load.num_decode + load.num_prefill))
    rig.update(decided)
    return load.num_prefill


def test_streams_bound_what_prompts_may_take() -> None:
    rig = Rig(num_blocks=400, max_step_tokens=512, pace=Pace(0.7))
    rig.resident("x")
    rig.add("stream", 4, "x", max_tokens=200)

    for _ in range(20):
        paced_step(rig)
    rig.add("long", 900)
    assert paced_step(rig) == 32  # at first
    assert [paced_step(rig) for _ in range(30)][-1] == 16
    rig.scheduler.abort(rig.scheduler.running[0])
    assert paced_step(rig) > 300  # nobody waits for it


def beside_a_stream(own: int) -> tuple[int, int]:
    """Most prompt tokens in a step of its own client, which has more to come, and of another's."""
    rig = Rig(num_blocks=4000, max_running=32, max_step_tokens=512, pace=Pace(0.7))

    def step() -> tuple[int, int]:
        decided = rig.schedule()
        load = load_of(decided.rows)
        rig.scheduler.learn(decided, 0.01 + 0.001 * (load.num_decode + load.num_prefill))
        rig.update(decided)
        rows = [row for row in decided.rows if not row.is_decode]
        others = sum(row.num_tokens for row in rows if row.sequence.tenant)
        return load.num_prefill - others, others

    rig.add("stream", 600, max_tokens=400)
    for _ in range(20):
        step()
    for index in range(own):
        rig.add(f"own{index}", 100)
    for index in range(20):
        rig.add(f"t{index}", 400, tenant="t")
    owns, others = zip(*(step() for _ in range(4)), strict=True)
    return max(owns), max(others)


def test_a_client_pays_for_its_own_burst_alone() -> None:
    assert max(beside_a_stream(own=0)) <= 32
    assert max(beside_a_stream(own=1)) <= 32
    own, others = beside_a_stream(own=4)
    assert own > 64
    assert others <= 32


def beside_three_streams(lengths: list[int]) -> int:
    """Prompt tokens in a step beside streams of others, of prompts that each have their client."""
    rig = Rig(num_blocks=4000, max_running=32, max_step_tokens=512, pace=Pace(0.7))

    for index in range(3):
        rig.add(f"stream{index}", 200, max_tokens=400)
    for _ in range(20):
        paced_step(rig)
    for index, length in enumerate(lengths):
        rig.add(f"t{index}", length, tenant=f"t{index}", max_tokens=400)
    return max(paced_step(rig) for _ in range(4))


def test_short_prompts_of_many_clients_have_more_of_a_step() -> None:
    few = beside_three_streams([100])
    assert beside_three_streams([600]) == beside_three_streams([600] * 4) == few
    assert beside_three_streams([100] * 4) >= 2 * few


# Places.


def test_the_last_places_are_left_to_those_who_have_less() -> None:
    rig = Rig(num_blocks=100, max_running=8)
    for digest in "xy":
        rig.resident(digest)
    rig.add("y1", 1, "y")
    for index in range(8):
        rig.add(f"x{index}", 1, "x")
    rig.step()
    held = [s.digest for s in rig.scheduler.running]
    assert (held.count("x"), held.count("y")) == (5, 1)
    rig.add("y2", 1, "y")
    assert "y2" in rig.step()


def test_places_that_nobody_comes_for_are_taken_all_but_one() -> None:
    rig = Rig(num_blocks=4000, max_running=16)
    for digest in "xy":
        rig.resident(digest)
    rig.add("y1", 1, "y", max_tokens=1000)
    for index in range(40):
        rig.add(f"x{index}", 1, "x", max_tokens=1000)
    num_running = []
    for _ in range(HEADROOM_STEPS + 2):
        rig.step()
        num_running.append(len(rig.scheduler.running))
    assert (num_running[0], num_running[-1]) == (12, 15)
    rig.add("y2", 1, "y", max_tokens=1000)
    assert "y2" in rig.step()
    rig.scheduler.abort(rig.scheduler.running[0])
    rig.scheduler.abort(rig.scheduler.running[-2])
    rig.step()
    assert len(rig.scheduler.running) == 14  # they came for it


def test_one_with_too_many_places_gives_one_up() -> None:
    rig, running = crowd()
    rig.add("y1", 2, "y")
    charge(rig, "x", MAX_LEAD - 20)
    assert "preempt" not in rig.step()  # some may end anyway
    charge(rig, "x", 20)
    assert rig.step() == "x0:3+1*, x1:3+1*, x2:3+1*, y1:0+2*, preempt"
    assert (running[-1].phase, running[-1].num_displaced) == (Phase.WAITING, 1)
    rig.add("y2", 2, "y")
    charge(rig, "x", 5000)
    assert rig.step().endswith("preempt")
    rig.add("y3", 2, "y")
    charge(rig, "x", 5000)
    assert "preempt" not in rig.step()  # now each has its half
    assert [s.digest for s in rig.scheduler.running] == ["x", "x", "y", "y"]


def test_a_sequence_gives_way_to_shares_only_so_often() -> None:
    rig, running = crowd(max_running=2)
    for sequence in running:
        sequence.num_displaced = MAX_DISPLACED
    rig.add("y1", 2, "y")
    charge(rig, "x", 10 * MAX_LEAD)
    assert "preempt" not in rig.step()


def test_a_higher_priority_takes_the_place_of_the_lowest() -> None:
    rig = Rig(max_running=3)
    rig.resident("x")
    for name, priority in (("usual", 0), ("low", -2), ("lower", -3)):
        rig.add(name, 2, priority=priority)
    rig.step()
    rig.add("same", 2, "x", priority=-3)
    assert "preempt" not in rig.step()
    for name in ("a", "b", "c"):
        rig.add(name, 2, "x", priority=1)
    assert [rig.step().count("preempt") for _ in range(4)] == [1, 1, 1, 0]
    assert [s.request_id for s in rig.scheduler.running] == ["a", "b", "c"]
    for sequence in list(rig.scheduler.running):
        rig.scheduler.abort(sequence)
    rig.step()
    assert [s.request_id for s in rig.scheduler.running] == ["usual", "low", "lower"]


def test_memory_comes_from_the_lowest_priority_then_from_the_client_served_most() -> None:
    rig = Rig(num_blocks=3)
    low, other, own = (
        rig.add("low", 4, priority=-1),
        rig.add("other", 4, tenant="t"),
        rig.add("own", 4),
    )
    rig.step()
    rig.scheduler.roster.fair.charge(("t", ()), 50, 0)
    assert rig.step() == "own:4+1*, preempt, preempt"
    assert (low.phase, other.phase, own.phase) == (Phase.WAITING, Phase.WAITING, Phase.RUNNING)


def test_a_higher_priority_gets_memory_from_a_lower_one() -> None:
    rig = Rig(num_blocks=4)
    low = rig.add("low", 13)
    rig.step()
    rig.add("same", 4)
    assert "preempt" not in rig.step()
    rig.add("high", 4, priority=1)
    assert rig.step() == "high:0+4*, preempt"  # and low is the next of its client
    assert low.phase is Phase.WAITING


def test_what_lower_ones_gave_up_is_kept_for_the_one_that_asked() -> None:
    rig = Rig(num_blocks=8)
    for name in ("low1", "low2", "low3", "low4"):
        rig.add(name, 5, tenant=name)
    rig.step()
    rig.add("high", 17, priority=1)
    assert [rig.step().count("preempt") for _ in range(4)] == [1, 1, 1, 0]
    assert [s.request_id for s in rig.scheduler.running] == ["low1", "high"]


def test_nobody_gives_way_whose_blocks_others_hold_as_well() -> None:
    rig = Rig(num_blocks=8, prefix_cache=True)
    kept = rig.add("kept", 17, priority=1)
    rig.step()
    low = rig.add("low", 17)  # a block of its own, and four that both hold
    rig.step()
    rig.add("high", 17, priority=1, tenant="t")
    assert "preempt" not in rig.step()
    rig.scheduler.abort(kept)
    assert rig.step().endswith("preempt")
    assert low.phase is Phase.WAITING


# The rest.


def test_blends_of_the_same_members_are_one_client() -> None:
    one, other = (
        Sequence(name, [0], SamplingParams(), StopParams(1), name, blend=parts)
        for name, parts in (
            ("one", (BlendPart("x", 0.5), BlendPart("y", 0.5))),
            ("other", (BlendPart("y", 0.7), BlendPart("x", 0.500001))),
        )
    )
    assert one.client == other.client == ("", ("x", "y"))
    single = Sequence("s", [0], SamplingParams(), StopParams(1), "x", tenant="t")
    assert single.client == ("t", ("x",))


def test_one_that_has_ended_is_not_kept_until_its_deadline() -> None:
    rig = Rig(max_running=1)
    ended = ref(rig.add("ended", 2, max_tokens=1, deadline=1e6))
    gone = ref(rig.add("gone", 2, deadline=1e6))
    rig.step()
    rig.scheduler.abort(next(iter(rig.scheduler.waiting)))
    assert ended() is None
    assert gone() is None
    late = [rig.add(f"late{index}", 2, deadline=9.0 - index) for index in range(3)]
    rig.now = 10.0
    assert [s.request_id for s in rig.scheduler.waiting.late(7.5)] == ["late2"]
    assert rig.step() == ", ".join(f"fail late{i} DEADLINE_EXCEEDED" for i in (2, 1, 0))
    assert {s.phase for s in late} == {Phase.FINISHED}


def test_what_is_computed_anew_is_charged_once() -> None:
    rig = Rig(max_running=1)
    rig.add("low", 10)
    rig.step()
    rig.add("high", 2, priority=1, max_tokens=1, tenant="t")
    rig.step()
    rig.step()  # low again, from the start
    assert served(rig.scheduler, ("", ())) == 10 + 2 + 2


def test_one_whose_deadline_passes_while_it_waits_is_dropped() -> None:
    rig = Rig(max_running=1)
    rig.add("runs", 2, deadline=1.5)
    rig.step()
    late = rig.add("late", 2, deadline=2.5)
    gone = rig.add("gone", 2, deadline=2.5)
    assert rig.step() == "runs:2+1*"
    rig.scheduler.abort(gone)
    assert rig.step() == "runs:3+1*, fail late DEADLINE_EXCEEDED"
    assert late.phase is Phase.FINISHED


@pytest.mark.parametrize(("amount", "first"), [(CREDIT / 2, "x"), (3 * CREDIT, "y")])
def test_an_unused_share_is_kept_for_a_while(amount: float, first: str) -> None:
    """x came seldom: a burst of it goes before y, but not for ever."""
    rig = Rig(max_running=1)
    for digest in "xy":
        rig.resident(digest)
    rig.add("runs", 1, max_tokens=60)
    rig.step()
    rig.add("y1", 1, "y")
    charge(rig, "y", 10 * CREDIT)
    rig.add("x1", 1, "x")
    charge(rig, "x", amount)
    rig.scheduler.abort(rig.scheduler.running[0])
    assert rig.step().startswith(first)
