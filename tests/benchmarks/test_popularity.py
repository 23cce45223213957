"""How a batch's rows are spread over adapters."""

from itertools import pairwise

import pytest
from popularity import POPULARITIES, adapters_of


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
