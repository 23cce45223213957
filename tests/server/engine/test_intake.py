"""Who may join the queue, and what those hear who may not."""

from contextlib import suppress

import pytest
from loraplex.engine.intake import MAX_RETRY, MIN_FINISHED, MIN_RETRY, Intake
from loraplex.engine.sequence import BlendPart, SamplingParams, Sequence, StopParams
from loraplex.errors import RequestError


def request(
    digest: str | None = None,
    num_prompt: int = 100,
    max_tokens: int = 50,
    priority: int = 0,
    deadline: float | None = None,
) -> Sequence:
    sequence = Sequence("r", [0] * num_prompt, SamplingParams(), StopParams(max_tokens), digest)
    sequence.priority, sequence.deadline = priority, deadline
    return sequence


def busy(max_live: int = 100, rate: float = 1000.0) -> Intake:
    """With so much of service a second, answers of 50 tokens, and both places taken."""
    intake = Intake(max_live, max_running=2)
    for _ in range(MIN_FINISHED):
        ended = request()
        intake.enter(ended, 0.0)
        intake.leave(ended, num_output=50)
    for _ in range(4):
        intake.served(2.5 * rate, 2.5)
    for _ in range(2):
        running = request("running")
        intake.enter(running, 0.0)
        intake.began(running)
    return intake


def fill(intake: Intake, digest: str | None) -> int:
    """As many as may come."""
    count = 0
    with suppress(RequestError):
        while True:
            intake.enter(request(digest), 0.0)
            count += 1
    return count


def test_one_client_fills_most_of_the_queue_and_the_next_most_of_the_rest() -> None:
    intake = Intake(100, max_running=4)
    assert [fill(intake, digest) for digest in "abcd"] == [81, 16, 3, 0]
    with pytest.raises(RequestError, match="--max-waiting") as error:
        intake.enter(request("e"), 0.0)
    assert error.value.retry_after == MIN_RETRY  # nothing is known of the rate


def test_the_message_says_which_bound() -> None:
    intake = Intake(100, max_running=4)
    fill(intake, "a")
    with pytest.raises(RequestError, match="for this adapter are waiting; others may") as error:
        intake.enter(request("a"), 0.0)
    assert error.value.reason.name == "QUEUE_FULL"
    first = request()
    intake.enter(first, 0.0)
    intake.leave(first)
    fill(intake, None)
    with pytest.raises(RequestError, match="for the base model are waiting"):
        intake.enter(request(), 0.0)


def test_places_are_open_to_one_client_alone() -> None:
    assert fill(Intake(5, max_running=5), "a") == 5


@pytest.mark.parametrize(
    ("max_running", "max_waiting", "num_queued"),
    [(64, 8, 7), (64, 16, 13), (64, 64, 52), (8, 2, 2)],
)
def test_one_client_alone_has_a_queue_however_short(
    max_running: int, max_waiting: int, num_queued: int
) -> None:
    intake = Intake(max_running + max_waiting, max_running)
    assert fill(intake, "a") == max_running + num_queued


def test_blends_that_differ_in_their_weights_share_one_part_of_the_queue() -> None:
    intake = Intake(100, max_running=4)
    blends = [request(f"blend {number}") for number in range(100)]
    for weight, blend in enumerate(blends):
        blend.blend = (BlendPart("a", 0.5), BlendPart("b", weight))
    with suppress(RequestError):
        for blend in blends:
            intake.enter(blend, 0.0)
    assert fill(intake, "a") > 0


def test_one_step_that_takes_too_long_does_not_make_the_rate() -> None:
    intake, own = busy(), request("a")
    fill(intake, "a")
    usual = intake.wait(own) or 0.0
    intake.served(1000.0, 600.0)
    assert usual < (intake.wait(own) or 0.0) < 1.5 * usual


def test_the_retry_is_when_those_ahead_have_been_served() -> None:
    intake = busy(max_live=30)
    count = fill(intake, "a")
    with pytest.raises(RequestError) as error:
        intake.enter(request("a"), 0.0)
    # 100 prompt tokens and 50 generated ones, which weigh double, for each of those that wait.
    assert error.value.retry_after == pytest.approx(count * 0.2, abs=0.1)
    slow = busy(max_live=30, rate=1.0)
    fill(slow, "a")
    with pytest.raises(RequestError) as error:
        slow.enter(request("a"), 0.0)
    assert error.value.retry_after == MAX_RETRY


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (request("a"), 4.0 + 0.2),  # its own twenty, and the other's one
        (request("b"), 0.2 + 0.3),  # of the others as much as its own and its prompt
        (request("c"), 0.1 + 0.1),
        (request("c", priority=1), 0.0),
        (request("c", priority=-1), 4.2),
    ],
)
def test_the_wait_under_fair_share(who: Sequence, expected: float) -> None:
    intake = busy()
    for digest, count in (("a", 20), ("b", 1)):
        for _ in range(count):
            intake.enter(request(digest), 0.0)
    assert intake.wait(who) == pytest.approx(expected)


def test_a_deadline_out_of_reach_is_refused() -> None:
    intake = busy()
    for _ in range(20):
        intake.enter(request("a"), 0.0)
    intake.enter(request("a", deadline=107.0), 104.8)  # the estimate is 4 s: it may do better
    intake.enter(request("b", deadline=105.0), 104.5)
    for deadline, reason in ((106.0, "DEADLINE_UNREACHABLE"), (104.8, "DEADLINE_EXCEEDED")):
        with pytest.raises(RequestError) as error:
            intake.enter(request("a", deadline=deadline), 104.8)
        assert error.value.reason.name == reason
    assert intake.wait(request("c")) == pytest.approx(0.2)  # those refused are not here


def test_nobody_is_refused_where_little_is_known_or_a_place_is_free() -> None:
    new = Intake(100, max_running=2)
    for _ in range(20):
        new.enter(request(deadline=0.001), 0.0)
    idle = busy(rate=0.001)
    for _ in range(2):
        idle.leave(request("running"))
    idle.enter(request(num_prompt=5000, deadline=0.001), 0.0)
