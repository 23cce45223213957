"""How requests, and a batch's rows, are spread over adapters."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from popularity import POPULARITIES, Popularity, adapters_of, draws


def drawn(text: str, number: int, count: int, seed: int = 1) -> list[int]:
    return Popularity.parse(text).draw(number, count, random.Random(seed))


def test_in_order() -> None:
    assert drawn("round-robin", 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert drawn("identical", 3, 4) == [0] * 4
    assert drawn("distinct", 9, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="distinct adapters for 4 requests, and there are 3"):
        drawn("distinct", 3, 4)


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("uniform", {1: 1.0, 9: 1.0}),
        ("zipf:1", {1: 2.0, 9: 10.0}),
        ("zipf:1.5", {1: 2.83, 3: 8.0}),
        ("power-law:1", {1: 1.0, 9: 1.0}),
        # Numbers below x are as frequent as (x/10)^0.5: the first has 0.316, the second 0.131.
        ("power-law:0.5", {1: 2.41, 9: 6.16}),
        ("weights:10,1,1,1,1,1,1,1,1,2", {1: 10.0, 9: 5.0}),
    ],
)
def test_how_much_rarer_than_the_first(text: str, ratios: dict[int, float]) -> None:
    counts = Counter(drawn(text, 10, 40_000))

    for adapter, ratio in ratios.items():
        assert counts[0] / counts[adapter] == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("skewed", "none of uniform, zipf"),
        ("zipf:a", "'a' is no number"),
        ("zipf:1,2", "takes one number"),
        ("zipf:0", "not positive"),
        ("power-law:nan", "not positive"),
        ("uniform:1", "takes no number"),
        ("weights", "a number for each adapter"),
    ],
)
def test_what_is_no_popularity(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Popularity.parse(text)


def test_what_is_not_said_has_a_default() -> None:
    assert str(Popularity.parse("zipf")) == "zipf:1"
    assert str(Popularity.parse("uniform")) == "uniform"


def test_draws_are_zipf_distributed() -> None:
    counts = Counter(draws(64, 1.0, 20_000, seed=1))

    assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.1)
    assert counts[0] / counts[9] == pytest.approx(10.0, rel=0.2)
    assert max(Counter(draws(16, 0.0, 16_000, seed=1)).values()) < 1200


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_adapters_ascend_from_zero_without_gaps(popularity: str, num_rows: int) -> None:
    adapters = adapters_of(popularity, num_rows)

    assert len(adapters) == num_rows
    assert adapters[0] == 0
    assert {after - before for before, after in pairwise(adapters)} <= {0, 1}


def test_from_one_adapter_to_one_a_row() -> None:
    counts = {popularity: len({*adapters_of(popularity, 64)}) for popularity in POPULARITIES}

    assert (counts["distinct"], counts["identical"], counts["uniform"]) == (64, 1, 8)
    assert counts["skewed"] == 7
    assert 8 < counts["zipf"] < 32


def test_skewed_rows_crowd_on_the_first() -> None:
    assert adapters_of("skewed", 20) == [0] * 18 + [1, 2]


def test_the_same_seed_draws_the_same() -> None:
    assert adapters_of("zipf", 32, seed=3) == adapters_of("zipf", 32, seed=3)
    assert adapters_of("zipf", 32, seed=3) != adapters_of("zipf", 32, seed=4)
