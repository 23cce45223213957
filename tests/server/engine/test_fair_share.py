"""Counters of service, and tokens of a step divided among clients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.engine.fair_share import CREDIT, MAX_IDLE, FairShare
from loraplex.engine.prefill import QUANTUM, SHORT, split
from loraplex.engine.sequence import Client

A: Client = ("", ("a",))
B: Client = ("", ("b",))
C: Client = ("t", ("b", "c"))  # another tenant's is another client


def test_prompt_tokens_count_once_and_generated_ones_twice() -> None:
    fair = FairShare()
    fair.enter(A, ())
    fair.charge(A, 10, 0)
    fair.charge(A, 0, 3)
    assert fair.counters == {A: 16.0}
    assert repr(fair) == "FairShare(/a 16)"
    fair.enter(C, ())
    assert repr(fair) == "FairShare(/a 16, t/b+c 0)"


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (0, 500, 0),  # what was not used for so little is kept
        (0, 9000, 9000 - CREDIT),
        (8500, 9000, 8500),
        (9500, 9000, 9500),  # never down
    ],
)
def test_one_that_comes_again_is_lifted_to_those_who_wait(
    own: int, others: int, expected: float
) -> None:
    fair = FairShare()
    for client, served in ((A, own), (B, others), (C, others + 1)):
        fair.enter(client, ())
        fair.charge(client, served, 0)
    fair.enter(A, [B, C])
    assert fair.counters[A] == expected
    fair.charge(B, 10_000, 0)
    fair.enter(A, [A, B])  # it waits already
    assert fair.counters[A] == expected


def test_where_nobody_waits_the_last_who_did_is_the_measure() -> None:
    fair = FairShare()
    fair.enter(A, ())
    fair.charge(A, 5000, 0)
    fair.last_left(A)
    fair.enter(B, ())
    assert fair.counters[B] == 5000 - CREDIT


def test_those_who_went_are_remembered_but_not_all_of_them() -> None:
    fair = FairShare()
    fair.enter(A, ())
    fair.enter(A, ())
    fair.charge(A, 7, 0)
    fair.leave(A)
    fair.check_integrity({A: 1})
    fair.leave(A)
    assert fair.num_clients == 0
    fair.enter(A, ())
    assert fair.counters[A] == 7
    fair.leave(A)
    for number in range(MAX_IDLE):
        fair.enter(("", (str(number),)), ())
        fair.leave(("", (str(number),)))
    fair.enter(A, ())
    assert fair.counters[A] == 0


@pytest.mark.parametrize(
    ("budget", "needs", "expected"),
    [
        (512, [4096, 64], [448, 64]),  # a short one is not held up
        (128, [4096, 64, 4096], [32, 64, 32]),
        (48, [4096, 64], [16, 32]),
        (32, [64, 64, 64], [32, 0, 0]),  # not in pieces
        (40, [10, 5, 64], [10, 5, 25]),
        (7, [64, 64], [7, 0]),
        (0, [64], [0]),
        (100, [], []),
    ],
)
def test_tokens_are_split_evenly_but_for_what_is_short(
    budget: int, needs: list[int], expected: list[int]
) -> None:
    assert split(budget, needs) == expected


def test_those_served_less_come_before_the_others_but_for_a_little() -> None:
    assert split(128, [64, 300, 64], num_first=1) == [64, 32, 32]
    assert split(64, [64, 300], num_first=1) == [64, 0]
    assert split(128, [300, 64], num_first=1) == [64, 64]
    assert split(512, [64, 100, 300], num_first=2) == [64, 100, 300]


@given(st.integers(0, 600), st.lists(st.integers(1, 500), max_size=12))
def test_no_token_is_left_that_anybody_needs(budget: int, needs: list[int]) -> None:
    grants = split(budget, needs)
    assert all(0 <= grant <= need for grant, need in zip(grants, needs, strict=True))
    assert sum(grants) == min(budget, sum(needs))
    if needs and budget >= SHORT * len(needs):
        assert all(g >= min(need, QUANTUM) for g, need in zip(grants, needs, strict=True))
