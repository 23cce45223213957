"""What fairness.py found: its figures, its limits, its tables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from command import Check, Findings, table
from figures import percentile
from load import Run
from measures import errors_of, jain_index, name_of
from shares import demand_served, first_tokens

LIMIT_DEMAND = 0.95
"""Of what each of the seven asks for, beside the flood."""

LIMIT_TTFT = 2.0
"""The 99th percentile of their TTFT beside the flood, over that without."""

LIMIT_JAIN = 0.95
MIN_REQUESTS = 300


class Backlog(NamedTuple):
    """What the adapters got under a mix, in the time that counts."""

    services: Mapping[str, int]
    tokens: Mapping[str, int]


class Flooded(NamedTuple):
    """The seven beside the eighth, which is left where it is when they have been answered."""

    seven: Run
    flood: Run


class Measured(NamedTuple):
    """All phases."""

    capacity: float  # generated tokens/s
    window: float  # seconds from the start of an open loop in which all of the seven's are due
    steady: Run
    flooded: Flooded
    backlogs: Mapping[str, Backlog]
    cpu_share: float  # of one core, the client's event loop, the most in a phase
    lag_p99: float  # seconds, of the same loop, likewise


def findings(measured: Measured, max_running: int) -> Findings:
    steady, (flooded, flood) = measured.steady, measured.flooded
    before, beside = (_by_adapter(run, measured.window) for run in (steady, flooded))
    p99s = [percentile(first_tokens(run.outcomes, run.end), 99) for run in (steady, flooded)]
    worst = max(beside[name]["p99_ttft_ms"] / before[name]["p99_ttft_ms"] for name in before)
    jains = {
        name: jain_index([*each.services.values()]) or 0.0
        for name, each in measured.backlogs.items()
    }
    requests = min(each["requests"] for run in (before, beside) for each in run.values())
    refused = _num_failed(flood)
    flood_tokens = sum(
        each.tokens_between(flood.start, flood.start + measured.window) for each in flood.outcomes
    )
    checks = [
        Check(
            "demand served beside the flood, the least of the seven",
            min(each["demand_served"] for each in beside.values()),
            LIMIT_DEMAND,
            at_most=False,
        ),
        Check("their p99 TTFT beside the flood over that without", p99s[1] / p99s[0], LIMIT_TTFT),
        Check("requests of each of the seven", requests, MIN_REQUESTS, at_most=False),
        *(
            Check(f"Jain's index of service, all waiting, {name}", jain, LIMIT_JAIN, at_most=False)
            for name, jain in jains.items()
        ),
    ]
    text = (
        f"{_open_table(before, beside)}\n\n{_backlog_table(measured.backlogs, jains)}\n\n"
        f"Capacity {measured.capacity:.0f} generated tokens/s with {max_running} at a time. All "
        f"seven together: p99 TTFT {p99s[0]:.0f} ms without, {p99s[1]:.0f} ms beside the flood; "
        f"the most for one adapter {worst:.2f}x. Of their requests, "
        f"{_num_failed(steady)} failed without{_in_brackets(errors_of([steady]))}, "
        f"{_num_failed(flooded)} beside{_in_brackets(errors_of([flooded]))}.\n"
        f"The flood asked for {len(flood.outcomes)} requests, of which {refused} were refused"
        f"{_in_brackets(errors_of([flood]))}, and got {flood_tokens / measured.window:.0f} "
        f"tokens/s. The client's event loop took {measured.cpu_share:.0%} of one core at most; its "
        f"p99 lag was {1000 * measured.lag_p99:.0f} ms."
    )
    record: dict[str, Any] = {
        "capacity_tokens_per_second": measured.capacity,
        "window_seconds": measured.window,
        "steady": before,
        "flooded": beside,
        "p99_ttft_ms": {"steady": p99s[0], "flooded": p99s[1]},
        "worst_p99_ratio_of_an_adapter": worst,
        "errors": {"steady": errors_of([steady]), "flooded": errors_of([flooded])},
        "flood": {
            "requests": len(flood.outcomes),
            "errors": errors_of([flood]),
            "tokens_per_second": flood_tokens / measured.window,
        },
        "backlogged": {
            name: {**each._asdict(), "jain": jains[name]}
            for name, each in measured.backlogs.items()
        },
        "client": {"cpu_share": measured.cpu_share, "p99_lag_ms": 1000 * measured.lag_p99},
    }
    return Findings(text, record, checks)


def _num_failed(run: Run) -> int:
    return sum(outcome.error is not None for outcome in run.outcomes)


def _in_brackets(errors: Mapping[str, int]) -> str:
    """Nothing for nothing."""
    return f" ({', '.join(f'{code}: {count}' for code, count in errors.items())})" if errors else ""


def _by_adapter(run: Run, window: float) -> dict[str, dict[str, float]]:
    served = demand_served(run.outcomes, run.start, run.start + window)
    figures = {}
    for name, share in sorted(served.items()):
        own = [outcome for outcome in run.outcomes if name_of(outcome) == name]
        waited = first_tokens(own, run.end)
        figures[name] = {
            "requests": len(own),
            "demand_served": share,
            **{f"p{p}_ttft_ms": percentile(waited, p) for p in (50, 99)},
        }
    return figures


def _open_table(
    before: Mapping[str, Mapping[str, float]], beside: Mapping[str, Mapping[str, float]]
) -> str:
    header = ["of the seven", "requests", "demand served", "TTFT ms p50", "p99"]
    header += ["beside the flood: served", "TTFT ms p50", "p99", "p99 over that without"]
    rows = [
        [
            name,
            f"{alone['requests']}",
            *_cells(alone),
            *_cells(beside[name]),
            f"{beside[name]['p99_ttft_ms'] / alone['p99_ttft_ms']:.2f}",
        ]
        for name, alone in before.items()
    ]
    return table(header, rows)


def _cells(each: Mapping[str, float]) -> list[str]:
    return [
        f"{each['demand_served']:.3f}",
        f"{each['p50_ttft_ms']:.0f}",
        f"{each['p99_ttft_ms']:.0f}",
    ]


def _backlog_table(backlogs: Mapping[str, Backlog], jains: Mapping[str, float]) -> str:
    header = ["all eight waiting", "least service", "most", "Jain's index", "of generated tokens"]
    rows = [
        [
            name,
            f"{min(each.services.values())}",
            f"{max(each.services.values())}",
            f"{jains[name]:.4f}",
            f"{jain_index([*each.tokens.values()]) or 0.0:.4f}",
        ]
        for name, each in backlogs.items()
    ]
    return table(header, rows)
