"""Rates and percentiles, on made-up arrivals."""

from collections.abc import Sequence

import pytest
from figures import (
    Arrival,
    Summary,
    Timeline,
    decode_rate,
    draining_rate,
    end_to_end_rate,
    num_tokens,
    percentile,
)


def every(step: float, begin: float, tokens: int) -> Timeline:
    """A token at `begin` and then one each `step` seconds."""
    return tuple(Arrival(begin + i * step, 1) for i in range(tokens))


@pytest.mark.parametrize(
    ("timelines", "rate"),
    [
        pytest.param([every(0.5, 3.0, 5)], 2.0, id="one request, prefill not counted"),
        pytest.param([every(0.5, 1.0, 9)] * 4, 8.0, id="a static batch"),
        pytest.param(
            [every(0.5, 1.0, 9), every(0.5, 2.0, 9)], 4.0, id="only while both are decoding"
        ),
        pytest.param(
            [every(0.5, 1.0, 9), tuple(Arrival(s + 0.01, n) for s, n in every(0.5, 1.0, 9))],
            4.0,
            id="one read a little later than the other",
        ),
        pytest.param(
            [(Arrival(1.0, 1), Arrival(2.0, 2), Arrival(3.0, 2))], 2.0, id="coalesced tokens"
        ),
        pytest.param([every(0.5, 1.0, 1)], None, id="nothing after the first token"),
        pytest.param([every(0.5, 1.0, 3), every(0.5, 9.0, 3)], None, id="one after the other"),
    ],
)
def test_decode_rate(timelines: Sequence[Timeline], rate: float | None) -> None:
    assert decode_rate(timelines) == (None if rate is None else pytest.approx(rate))


def test_end_to_end_counts_every_token_up_to_the_last() -> None:
    assert end_to_end_rate([every(0.5, 1.0, 5), every(0.5, 3.0, 5)]) == pytest.approx(2.0)


def test_num_tokens_counts_coalesced_ones() -> None:
    assert num_tokens((Arrival(1.0, 1), Arrival(2.0, 3))) == 4


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7.0], 90, 7.0), ([1.0, 3.0], 50, 2.0), ([3.0, 1.0, 2.0], 100, 3.0), ([0.0, 10.0], 90, 9.0)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_draining_counts_from_the_first_token_of_all_to_the_last() -> None:
    first, second = every(0.5, 1.0, 3), every(0.5, 2.0, 5)

    assert draining_rate([first, second]) == pytest.approx(6 / 3.0)
    assert draining_rate([first, ()]) == pytest.approx(2 / 1.0)
    assert draining_rate([(), ()]) is None
    assert draining_rate([every(0.5, 1.0, 1)]) is None


def test_summary_takes_medians_of_waves_and_of_all_first_tokens() -> None:
    steps = (0.5, 1.0, 0.25)
    waves = [[every(step, 1.0, 5), every(step, 1.5, 5)] for step in steps]
    summary = Summary.of(waves, asked=5, seconds=60.0)

    assert summary.decode == pytest.approx(4.0)
    assert summary.decode_waves == pytest.approx((4.0, 2.0, 8.0))
    assert summary.end_to_end == pytest.approx(10 / 3.5)
    assert summary.first_token_median == pytest.approx(1.25)
    assert summary.first_token_p90 == pytest.approx(1.5)
    assert summary.spread == pytest.approx((10 / 2.5 - 10 / 5.5) * 3.5 / 10)
    assert not summary.one_by_one
    assert not summary.cut


def test_summary_of_requests_that_did_not_run_together_is_of_draining() -> None:
    summary = Summary.of([[every(0.5, 1.0, 3), every(0.5, 9.0, 3)]], asked=3, seconds=60.0)

    assert summary.one_by_one
    assert summary.decode == pytest.approx(4 / 9.0)


def test_summary_of_a_stopped_wave_counts_silent_requests_at_its_end() -> None:
    summary = Summary.of([[every(0.5, 1.0, 3), ()]], asked=5, seconds=8.0)

    assert summary.cut
    assert summary.first_token_median == pytest.approx(4.5)
    assert summary.end_to_end == pytest.approx(3 / 2.0)


def test_a_wave_stopped_near_its_beginning_has_no_rate() -> None:
    assert Summary.of([[every(0.5, 7.0, 2), ()]], asked=64, seconds=8.0).decode is None


def test_summary_without_a_decode_span() -> None:
    assert Summary.of([[every(0.5, 1.0, 1)]], asked=1, seconds=60.0).decode is None
