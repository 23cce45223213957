"""Who runs, who waits, who gives way; each case with an arena of a few blocks of four tokens."""

import pytest
from loraplex.engine.arena import Use
from loraplex.engine.sequence import FinishReason, Logprobs, Phase
from loraplex.engine.step import Outcome, Sampled

from tests.server.engine.rig import STOP, Rig


def test_decode_goes_first_and_prompts_share_what_is_left() -> None:
    rig = Rig(max_step_tokens=8)
    rig.add("a", 5)
    assert rig.step() == "a:0+5*"
    rig.add("b", 12)
    rig.add("c", 3)
    assert rig.step() == "a:5+1*, b:0+7"
    assert rig.step() == "a:6+1*, b:7+5*, c:0+2"
    assert rig.step() == "a:7+1*, b:12+1*, c:2+1*"


def test_rows_are_ordered_by_decode_first_then_slot() -> None:
    rig = Rig()
    slots = {rig.resident(digest): digest for digest in "xyz"}
    for slot in sorted(slots, reverse=True):
        rig.add(f"s{slot}", 3, slots[slot])
    rig.add("base", 3)
    assert rig.step() == "base:0+3*, s0:0+3*, s1:0+3*, s2:0+3*"
    rig.add("late", 2, slots[0])
    rig.add("one", 1, slots[1])  # a prompt of one token is a decode row
    assert rig.step() == "base:3+1*, s0:3+1*, s1:3+1*, one:0+1*, s2:3+1*, late:0+2*"


def test_the_budget_may_be_smaller_than_the_batch() -> None:
    rig = Rig(max_step_tokens=2)
    for name in "abc":
        rig.add(name, 1, max_tokens=2)
    assert rig.steps(3) == ["a:0+1*, b:0+1*", "a:1+1*, b:1+1*", "c:0+1*"]


def test_max_running_holds_back_the_rest() -> None:
    rig = Rig(max_running=2)
    for name in "abc":
        rig.add(name, 1, max_tokens=2)
    assert rig.steps(3) == ["a:0+1*, b:0+1*", "a:1+1*, b:1+1*", "c:0+1*"]


def test_one_that_waits_for_memory_holds_back_its_client() -> None:
    rig = Rig(num_blocks=4)
    rig.add("a", 8, max_tokens=2)
    rig.add("big", 12)
    rig.add("small", 2)
    assert rig.steps(3) == ["a:0+8*", "a:8+1*", "big:0+12*, small:0+2*"]


def test_one_that_waits_for_memory_is_overtaken_as_often_as_there_are_places() -> None:
    rig = Rig(num_blocks=5, max_running=2)
    rig.add("a", 13, max_tokens=4)
    rig.step()
    rig.add("big", 12)
    for name in "123":
        rig.add(name, 2, max_tokens=1, priority=-1)
    assert rig.steps(3) == ["a:13+1*, 1:0+2*", "a:14+1*, 2:0+2*", "a:15+1*"]
    assert rig.step() == "big:0+12*, 3:0+2*"


def test_one_that_waits_for_its_adapter_is_overtaken() -> None:
    rig = Rig()
    slow = rig.add("slow", 2, "x")
    rig.add("too", 2, "x")
    rig.add("fast", 2)
    assert rig.step() == "fast:0+2*, need x"
    assert rig.step() == "fast:2+1*, need x"
    assert rig.step({"x": 3}) == "fast:3+1*, load x"
    assert rig.step({"x": 3}) == "fast:4+1*"
    rig.loaded("x")
    assert rig.step() == "fast:5+1*, slow:0+2*, too:0+2*"
    assert (slow.adapter_ready_at, slow.admitted_at) == (4.0, 5.0)
    assert slow.timings(7.0).adapter_wait == 4.0


def test_one_that_waits_for_a_slot_is_overtaken() -> None:
    rig = Rig(num_slots=1)
    rig.resident("x")
    rig.add("a", 2, "x", max_tokens=2)
    rig.add("b", 2, "y")
    rig.add("c", 2)
    sizes = {"y": 2}
    assert rig.step(sizes) == "c:0+2*, a:0+2*"
    assert rig.step(sizes) == "c:2+1*, a:2+1*"
    assert rig.step(sizes) == "c:3+1*, load y, evict"


def test_idle_adapters_go_before_anyone_is_preempted() -> None:
    rig = Rig(num_blocks=4)
    rig.resident("idle", 2)
    rig.add("a", 4)
    rig.add("b", 4)
    assert rig.step() == "a:0+4*, b:0+4*"
    assert rig.step() == "a:4+1*, b:4+1*, evict"
    assert rig.pool.get("idle") is None


def test_the_newest_gives_way_and_comes_back_first_with_all_its_tokens() -> None:
    rig = Rig(num_blocks=4)
    slot = rig.resident("x", 1)
    a = rig.add("a", 4, max_tokens=6)
    b = rig.add("b", 4, "x")
    assert rig.step() == "a:0+4*, b:0+4*"
    rig.add("c", 1, max_tokens=1)
    assert rig.step() == "a:4+1*, preempt"
    assert (b.phase, b.block_table, b.slot, b.num_computed) == (Phase.WAITING, [], None, 0)
    # b needs two blocks for five tokens; c makes do with one.
    assert rig.steps(2) == ["a:5+1*, c:0+1*", "a:6+1*"]
    assert rig.steps(2) == ["a:7+1*", "a:8+1*"]
    assert a.phase is Phase.FINISHED
    assert rig.step() == "b:0+5*"
    assert b.slot == slot
    assert b.output_token_ids == [1, 1]
    assert b.admitted_at == 1.0  # queueing ended when it first ran


def test_alone_and_out_of_memory() -> None:
    rig = Rig(num_blocks=3)
    rig.resident("x", 1)
    a = rig.add("a", 7, "x")
    assert rig.steps(2) == ["a:0+7*", "a:7+1*"]
    assert rig.step() == "fail a OUT_OF_MEMORY"
    assert a.phase is Phase.FINISHED
    assert rig.arena.count(Use.KV) == 0


def test_an_adapter_on_its_way_is_no_reason_to_fail() -> None:
    rig = Rig(num_blocks=3)
    rig.add("b", 1, "x")
    assert rig.step({"x": 1}) == "load x"
    rig.add("a", 7, max_tokens=3)
    assert rig.step() == "a:0+7*"
    assert rig.step() == "a:7+1*"
    assert rig.step() == "preempt"
    assert rig.step() == ""
    rig.loaded("x")
    assert rig.step() == "a:0+9*, need x, evict"


@pytest.mark.parametrize(
    ("num_prompt", "digest", "expected"),
    [
        (12, None, "r:0+12*"),
        (13, None, "fail r EXCEEDS_KV_CAPACITY"),
        (4, "x", "load x"),
        (5, "x", "fail r EXCEEDS_KV_CAPACITY"),
        (1, "y", "fail r EXCEEDS_KV_CAPACITY"),
    ],
)
def test_what_could_never_fit_is_refused(
    num_prompt: int, digest: str | None, expected: str
) -> None:
    rig = Rig(num_blocks=3)
    rig.add("r", num_prompt, digest)
    assert rig.step({"x": 2, "y": 3}) == expected


@pytest.mark.parametrize(
    ("token_id", "max_tokens", "finish"),
    [
        (1, 2, None),
        (STOP, 2, FinishReason.STOP_TOKEN),
        (1, 1, FinishReason.LENGTH),
        (STOP, 1, FinishReason.STOP_TOKEN),
    ],
)
def test_the_end_of_a_sequence(token_id: int, max_tokens: int, finish: FinishReason | None) -> None:
    rig = Rig()
    rig.resident("x")
    sequence = rig.add("a", 3, "x", max_tokens=max_tokens)
    (outcome,) = rig.update(rig.schedule(), token_id)
    assert outcome == Outcome(sequence, (Sampled(token_id),), finish)
    assert sequence.output_token_ids == [token_id]
    assert (sequence.phase is Phase.FINISHED) == (finish is not None)
    assert (rig.arena.count(Use.KV) == 0) == (finish is not None)


def test_logits_that_are_not_finite_end_their_sequence_only() -> None:
    rig = Rig()
    sick, well = rig.add("sick", 3), rig.add("well", 3)
    step = rig.schedule()
    logprobs = Logprobs(-0.5, ())
    outcomes = rig.scheduler.update(step, [(), (Sampled(5, logprobs),)], rig.now)
    assert outcomes == [Outcome(sick, (), None), Outcome(well, (Sampled(5, logprobs),), None)]
    assert sick.phase is Phase.FINISHED
    assert rig.step() == "well:3+1*"


def test_abort_wherever_it_stands() -> None:
    rig = Rig(max_running=2, max_step_tokens=4)
    rig.resident("x")
    sequences = [rig.add(name, n, "x") for name, n in (("done", 1), ("chunk", 9), ("queued", 2))]
    rig.step()
    assert [s.phase for s in sequences] == [Phase.RUNNING, Phase.RUNNING, Phase.WAITING]
    for sequence in sequences:
        rig.scheduler.abort(sequence)
        rig.scheduler.check_integrity()
        assert sequence.phase is Phase.FINISHED
    rig.scheduler.abort(sequences[0])  # again
    assert rig.arena.count(Use.KV) == 0
    assert rig.step() == ""
    assert rig.pool.make_room(rig.arena.num_blocks) == ("x",)
