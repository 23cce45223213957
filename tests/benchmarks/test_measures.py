"""Figures from runs made by hand."""

import pytest
from measures import (
    Figures,
    adapters_of,
    backlogged,
    errors_of,
    figures_of,
    is_good,
    jain_index,
    lateness,
    median_figures,
    spread,
    tokens_by_second,
    tpot,
    ttft,
)

from tests.benchmarks.timelines import outcome, run


def test_latencies_count_from_being_due_not_from_being_sent() -> None:
    """A server that stalls for 5 s holds a client up; what was due meanwhile waited, too."""
    stalled = outcome(0.0, 5.0, 5.1, 5.2)
    held_up = [outcome(float(due), 5.3, 5.4, sent=5.2) for due in range(1, 5)]

    figures = figures_of(run(stalled, *held_up), {})

    assert [ttft(each) for each in held_up] == pytest.approx([4300, 3300, 2300, 1300])
    assert [lateness(each) for each in held_up] == pytest.approx([4200, 3200, 2200, 1200])
    assert figures["median_ttft_ms"] == pytest.approx(3300)
    assert figures["p99_client_lateness_ms"] == pytest.approx(4200, rel=0.02)


def test_tokens_that_come_together() -> None:
    """Two arrivals of three tokens are two pauses, and six tokens of the time per token."""
    each = outcome(0.0, 1.0, 1.6, 2.2, counts=(1, 3, 3))
    figures = figures_of(run(each), {})

    assert tpot(each) == pytest.approx(200)
    assert figures["mean_itl_ms"] == pytest.approx(600)
    assert figures["total_output_tokens"] == 7
    assert figures["tokens_per_arrival"] == pytest.approx(7 / 3)
    assert tpot(outcome(0.0, 1.0, counts=(4,))) is None


def test_rates_count_what_was_served() -> None:
    figures = figures_of(
        run(
            outcome(0.0, 1.0, 2.0),
            outcome(0.5, 1.5, 2.5, 3.5, is_cut=True),
            outcome(1.0, 2.0, error="UNAVAILABLE"),
            outcome(9.0, is_cut=True),
            end=4.0,
        ),
        {},
    )

    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (1, 1, 2)
    assert figures["unstarted"] == 1
    assert (figures["mean_ttft_ms"], figures["mean_e2el_ms"]) == (1000, 2000)
    assert figures["request_throughput"] == 0.25
    assert figures["output_throughput"] == 5 / 4
    assert figures["input_throughput"] == 6 / 4
    assert figures["total_token_throughput"] == 11 / 4
    assert figures["max_concurrent_requests"] == 3


def test_percentiles_and_deviation() -> None:
    assert spread("x", [1.0, 2.0, 3.0, 4.0, 10.0]) == pytest.approx(
        {
            "mean_x_ms": 4.0,
            "median_x_ms": 3.0,
            "std_x_ms": 10**0.5,
            "p90_x_ms": 7.6,
            "p99_x_ms": 9.76,
        }
    )
    assert set(spread("x", []).values()) == {None}


def test_goodput_needs_every_objective() -> None:
    slo = {"ttft": 500.0, "tpot": 100.0, "e2el": 2000.0}
    in_time = outcome(0.0, 0.5, 0.6)
    late = outcome(0.0, 0.6, 0.7)
    slow = outcome(0.0, 0.5, 0.7)
    long = outcome(0.0, 0.5, 0.6, ended=2.1)
    single = outcome(0.0, 0.4)
    failed = outcome(0.0, 0.1, 0.2, error="INTERNAL")

    figures = figures_of(run(in_time, late, slow, long, single, failed), slo)

    assert [is_good(each, slo) for each in (in_time, late, slow, long, single, failed)] == [
        *(True, False, False, False, True, False)
    ]
    assert figures["request_goodput"] == 0.2
    assert figures["good_share"] == pytest.approx(2 / 6)
    assert figures["good_ttft_share"] == pytest.approx(4 / 6)
    assert figures_of(run(in_time), {})["request_goodput"] is None


def test_cold_is_what_waited_for_its_adapter() -> None:
    figures = figures_of(
        run(outcome(0.0, 3.0, wait=2.0), outcome(0.0, 1.0), outcome(0.0, 0.5, adapter=None)), {}
    )

    assert (figures["cold_requests"], figures["warm_requests"]) == (1, 1)
    assert (figures["median_ttft_cold_ms"], figures["median_ttft_warm_ms"]) == (3000, 1000)
    assert figures["mean_adapter_wait_ms"] == pytest.approx(2000 / 3)
    assert figures["median_queue_ms"] == 250


@pytest.mark.parametrize(
    ("shares", "index"),
    [
        ([5.0, 5.0, 5.0, 5.0], 1.0),
        ([7.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 2.0, 3.0], 36 / 42),
        ([], None),
        ([0.0], None),
    ],
)
def test_jains_index(shares: list[float], index: float | None) -> None:
    assert jain_index(shares) == (None if index is None else pytest.approx(index))


def test_service_is_compared_only_while_everybody_waits() -> None:
    """`a` gets four tokens, two of them while `b` asks for nothing."""
    found = run(
        outcome(0.0, 1.0, 2.5),
        outcome(0.0, 4.0, 4.5),
        outcome(2.0, 3.0, 5.0, adapter="b"),
    )
    figures = figures_of(found, {})

    assert backlogged(found) == [(2.0, 3.0)]
    assert figures["backlogged_seconds"] == 1.0
    assert figures["jain_index_backlogged"] == 0.5  # one token of a's, at 2.5, and none of b's
    assert figures["jain_index"] == pytest.approx(36 / (2 * 20))
    assert (figures["min_adapter_tokens"], figures["max_adapter_tokens"]) == (2, 4)
    assert figures["jain_index_of_demand"] == pytest.approx(1.0)


def test_who_fails_or_is_cut_off_waits_no_longer() -> None:
    failed = run(outcome(0.0, ended=2.0, error="INTERNAL"), outcome(1.0, 5.0, adapter="b"))
    cut = run(outcome(0.0, is_cut=True), outcome(1.0, adapter="b", is_cut=True), end=4.0)

    assert backlogged(failed) == [(1.0, 2.0)]
    assert backlogged(cut) == [(1.0, 4.0)]


def test_each_adapter_over_all_runs() -> None:
    runs = [run(outcome(0.0, 1.0, 2.0), outcome(0.0, 3.0, adapter=None)), run(outcome(0.0, 2.0))]
    adapters = adapters_of(runs)

    assert list(adapters) == ["(base)", "a"]
    assert adapters["a"]["output_tokens"] == 3
    assert adapters["a"]["median_ttft_ms"] == 1500
    assert errors_of(runs) == {}
    failed = [outcome(error=error) for error in ("UNAVAILABLE", "INTERNAL", "INTERNAL")]
    assert list(errors_of([run(*failed)]).items()) == [("INTERNAL", 2), ("UNAVAILABLE", 1)]


def test_tokens_fall_into_their_second() -> None:
    assert tokens_by_second(run(outcome(0.0, 0.2, 0.9, 2.1), outcome(0.0, 2.5))) == [2, 0, 2]
    assert tokens_by_second(run()) == []


def test_medians_leave_out_runs_without_a_figure() -> None:
    runs: list[Figures] = [{"x": 1.0, "y": None}, {"x": 4.0, "y": 2.0}, {"x": 9.0, "y": None}]

    assert median_figures(runs) == {"x": 4.0, "y": 2.0}
    assert median_figures([{"x": None}]) == {"x": None}


def test_nothing_was_answered() -> None:
    figures = figures_of(run(), {"ttft": 1.0})

    assert figures["completed"] == 0
    assert figures["median_ttft_ms"] is None
    assert figures["good_share"] == 0
