"""How long prompts and answers are."""

import random
import statistics

import pytest
from lengths import Fixed, LogNormal, Uniform, parse_lengths


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("64", Fixed(64)),
        ("16:256", Uniform(16, 256)),
        ("lognormal:128:0.8", LogNormal(128, 0.8, 1, 1_000_000)),
        ("lognormal:128:0.8:4", LogNormal(128, 0.8, 4, 1_000_000)),
        ("lognormal:128:0.8:4:1024", LogNormal(128, 0.8, 4, 1024)),
    ],
)
def test_what_is_typed(text: str, lengths: object) -> None:
    assert parse_lengths(text) == lengths
    assert parse_lengths(str(lengths)) == lengths


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not N"),
        ("0", "is not N"),
        ("-3", "is not N"),
        ("1:2:3", "is not N"),
        ("9:3", "9 is more than 3"),
        ("lognormal:128", "is not lognormal:MEAN:SIGMA"),
        ("lognormal:0:1", "at least 1 token"),
        ("lognormal:nan:1", "at least 1 token"),
        ("lognormal:64:1:8:4", "8 is more than 4"),
        ("lognormal:64:1:0", "bounds are"),
    ],
)
def test_what_is_no_length(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_lengths(text)


def test_uniform_reaches_both_bounds() -> None:
    rng = random.Random(1)

    assert {Uniform(3, 5).draw(rng) for _ in range(100)} == {3, 4, 5}


def test_log_normal_has_its_mean_and_keeps_to_its_bounds() -> None:
    rng = random.Random(1)
    free = [LogNormal(100, 0.5, 1, 10**6).draw(rng) for _ in range(5000)]
    bound = [LogNormal(100, 0.5, 60, 180).draw(rng) for _ in range(5000)]

    assert statistics.fmean(free) == pytest.approx(100, rel=0.03)
    assert statistics.median(free) == pytest.approx(88, rel=0.03)  # 100 exp(-0.5^2 / 2)
    assert (min(bound), max(bound)) == (60, 180)
    assert min(free) < 60 < 180 < max(free)
