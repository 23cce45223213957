"""When requests are due."""

import math
import random
import statistics
from itertools import pairwise

import pytest
from arrivals import arrival_times

COUNT, RATE = 4000, 8.0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness: float) -> None:
    times = arrival_times(COUNT, RATE, burstiness, random.Random(1))
    gaps = [after - before for before, after in pairwise([0.0, *times])]

    assert statistics.fmean(gaps) == pytest.approx(1 / RATE)
    variation = statistics.stdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.1)
    if burstiness == 1.0:  # Poisson: exponential gaps, of which 1/e are longer than the mean
        longer = sum(gap > 1 / RATE for gap in gaps) / COUNT
        assert longer == pytest.approx(1 / math.e, abs=0.03)


def test_every_seed_offers_the_same_load_in_another_pattern() -> None:
    one, other = (arrival_times(100, RATE, 1.0, random.Random(seed)) for seed in (1, 2))

    assert one[-1] == pytest.approx(other[-1]) == pytest.approx(100 / RATE)
    assert one == sorted(one)
    assert one != other
    assert one == arrival_times(100, RATE, 1.0, random.Random(1))


def test_the_ends_of_both_scales() -> None:
    rng = random.Random(1)

    assert arrival_times(3, math.inf, 1.0, rng) == [0.0] * 3
    assert arrival_times(3, 2.0, math.inf, rng) == [0.5, 1.0, 1.5]
    assert arrival_times(0, 2.0, 1.0, rng) == []
    with pytest.raises(ValueError, match="positive"):
        arrival_times(1, 2.0, 0.0, rng)
