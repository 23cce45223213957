"""What each adapter asked for and got."""

import pytest
from outcome import Outcome
from shares import demand_served, first_tokens, service
from workload import Request


def outcome(
    *arrivals: float, due: float = 0.0, adapter: str = "a", prompt: int = 10, asked: int = 4
) -> Outcome:
    """One token an arrival."""
    request = Request(tuple(range(prompt)), adapter, asked, due)
    return Outcome(request, due, arrivals=list(arrivals), counts=[1] * len(arrivals))


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        pytest.param(0.0, 9.0, 10 + 2 * 3, id="all of it"),
        pytest.param(2.0, 9.0, 2 * 2, id="prefilled before"),
        pytest.param(0.0, 1.0, 0, id="not yet"),
    ],
)
def test_service_weighs_output_double(begin: float, end: float, expected: int) -> None:
    assert service(outcome(1.0, 2.0, 3.0), begin, end) == expected


def test_a_request_without_a_token_got_no_service() -> None:
    assert service(outcome(), 0.0, 9.0) == 0


def test_demand_served_counts_late_and_missing_tokens_against_the_server() -> None:
    outcomes = [
        outcome(1.0, 2.0, 3.0, 4.0),
        outcome(8.0, 9.0, 11.0, 12.0, due=7.0),  # half of it after the end
        outcome(due=5.0),  # refused
        outcome(5.0, 6.0, due=5.0, adapter="b", asked=2),
        outcome(12.0, due=11.0, adapter="b"),  # due after the end
    ]

    assert demand_served(outcomes, 0.0, 10.0) == {"a": 6 / 12, "b": 1.0}


def test_first_tokens_of_those_never_answered_are_as_late_as_the_end() -> None:
    assert first_tokens([outcome(3.0, due=1.0), outcome(due=4.0)], 10.0) == [2000.0, 6000.0]
