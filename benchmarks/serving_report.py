"""What serving.py says: a Markdown table for people, JSON with the keys of vLLM's tool for
programs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from command import table
from environment import in_words
from load import Run
from measures import (
    Figures,
    adapters_of,
    e2el,
    errors_of,
    figures_of,
    itl,
    median_figures,
    ttft,
)

MOST_ADAPTERS_SHOWN = 16
LATE_MS = 20.0
"""A client that is later than that, in one of a hundred cases, is in the figures."""

BUSY_SHARE = 0.8
"""Of one core; an event loop has no more than one."""

LATENCIES = {
    "TTFT": "ttft",
    "TPOT": "tpot",
    "ITL": "itl",
    "E2E": "e2el",
    "queue": "queue",
    "adapter wait": "adapter_wait",
}


@dataclass(frozen=True, slots=True)
class Report:
    """All runs of one workload."""

    runs: Sequence[Run]
    by_run: Sequence[Figures]
    figures: Figures  # medians over the runs
    slo: Mapping[str, float]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        slo: Mapping[str, float],
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
    ) -> "Report":
        by_run = [figures_of(run, slo) for run in runs]
        return cls(runs, by_run, median_figures(by_run), slo, settings, environment)

    @property
    def is_incomplete(self) -> bool:
        return any(run.is_interrupted for run in self.runs)

    @property
    def title(self) -> str:
        """Who was asked what."""
        settings = self.settings
        what = f"{settings['served_model']} on {settings['device']}, {settings['pace']}"
        if "trace" in settings:
            return what
        adapters = len(settings["adapter"]) or settings["num_adapters"]
        ranks = ", ".join(map(str, settings["rank"]))
        kind = "" if settings["adapter"] else f" of rank {ranks}"
        whom = f"{adapters} adapters{kind}, {settings['popularity']}"
        whom = whom if adapters else "the bare base"
        prefix = settings["shared_prefix"]
        shared = f"{prefix} shared tokens and " if prefix else ""
        return (
            f"{what}; {whom}; prompts of {shared}{settings['prompt_tokens']} tokens, answers of "
            f"{settings['max_tokens']}"
        )

    def warnings(self) -> list[str]:
        """What a reader must know before believing the figures."""
        return [*self._about_the_client(), *self._about_the_answers()]

    def _about_the_client(self) -> list[str]:
        said = []
        late, lag = (
            max((run[key] or 0.0 for run in self.by_run), default=0.0)
            for key in ("p99_client_lateness_ms", "p99_client_lag_ms")
        )
        busy = max((run["client_cpu_share"] or 0.0 for run in self.by_run), default=0.0)
        if late > LATE_MS and self.settings["concurrency"] is None:
            said.append(f"the client sent late (p99 {late:.0f} ms): it is part of the latencies")
        if lag > LATE_MS:
            said.append(f"the client's event loop woke late (p99 {lag:.0f} ms): it saw tokens late")
        if busy > BUSY_SHARE:
            said.append(f"the client was busy for {busy:.0%} of a core: it may be the bottleneck")
        return said

    def _about_the_answers(self) -> list[str]:
        said = []
        wrong, unstarted = (
            sum(run[key] or 0 for run in self.by_run) for key in ("wrong_length", "unstarted")
        )
        if wrong:
            said.append(f"{wrong:g} answers were not as long as they were asked to be")
        if unstarted:
            said.append(f"{unstarted:g} requests still waited when cut off: no latency has them")
        return said


def as_json(report: Report, detailed: bool) -> dict[str, Any]:
    """Flat, as vLLM's; `runs`, `adapters`, `environment`, `settings` and more are ours."""
    settings, about = report.settings, report.environment
    rate = settings["request_rate"]
    record: dict[str, Any] = {
        "date": about["date"].translate({ord("-"): None, ord(":"): None}).replace("T", "-")[:15],
        "endpoint_type": "loraplex",
        "backend": "loraplex",
        "label": settings["label"],
        "model_id": settings["served_model"],
        "tokenizer_id": settings["served_model"],
        "num_prompts": settings["num_requests"],
        "request_rate": _jsonable(rate),
        "burstiness": _jsonable(settings["burstiness"]),
        "max_concurrency": settings["concurrency"],
        **{key: _whole(value) for key, value in report.figures.items()},
        "incomplete": report.is_incomplete,
        "errors_by_code": errors_of(report.runs),
        "warnings": report.warnings(),
        "slo": dict(report.slo),
        "seed": settings["seed"],
        "adapters": adapters_of(report.runs),
        "runs": list(report.by_run),
        "settings": {name: _jsonable(value) for name, value in settings.items()},
        "environment": dict(about),
    }
    return record | (_details(report.runs) if detailed else {})


def _details(runs: Sequence[Run]) -> dict[str, Any]:
    """Lists over the requests of all runs, in seconds, by vLLM's names."""
    outcomes = [(run, outcome) for run in runs for outcome in run.outcomes]
    return {
        "input_lens": [len(each.request.token_ids) for _, each in outcomes],
        "output_lens": [each.num_tokens for _, each in outcomes],
        "ttfts": [_in_seconds(ttft(each)) for _, each in outcomes],
        "itls": [[gap / 1e3 for gap in itl(each)] for _, each in outcomes],
        "latencies": [_in_seconds(e2el(each)) for _, each in outcomes],
        "start_times": [each.due - run.start for run, each in outcomes],
        "errors": [each.error or "" for _, each in outcomes],
        "adapter_ids": [each.request.adapter or "" for _, each in outcomes],
    }


def markdown(report: Report) -> str:
    """Tables, warnings, and what a reader of them alone must know."""
    parts = []
    if report.is_incomplete:
        parts.append("**Incomplete: interrupted; this is what was measured until then.**")
    parts.append(table(["", ""], _rows(report)))
    parts.append(table(["", "mean", "p50", "p90", "p99", "std"], _latency_rows(report.figures)))
    adapters = adapters_of(report.runs)
    if 1 < len(adapters) <= MOST_ADAPTERS_SHOWN:
        title = "adapter" if len(report.runs) == 1 else "adapter, all runs"
        parts.append(_adapter_table(title, adapters))
    parts += [f"WARNING: {warning}." for warning in report.warnings()]
    if len(report.runs) > 1:
        parts.append(_repeats(report))
    parts.append(_conditions(report))
    return "\n\n".join(parts)


def _latency_rows(figures: Figures) -> list[list[str]]:
    rows = []
    for title, name in LATENCIES.items():
        keys = (f"{part}_{name}_ms" for part in ("mean", "median", "p90", "p99", "std"))
        rows.append([f"{title} (ms)", *(_number(figures[key], 1) for key in keys)])
    return rows


def _rows(report: Report) -> list[list[str]]:
    figures = report.figures
    failed = f", {_number(figures['failed'])} failed" if figures["failed"] else ""
    left = f", {_number(figures['unfinished'])} cut off" if figures["unfinished"] else ""
    asked = report.runs[0].num_requests
    rows = [
        ["requests", f"{_number(figures['completed'])} of {asked} completed{failed}{left}"],
        ["duration (s)", _number(figures["duration"], 2)],
        ["requests/s", _number(figures["request_throughput"], 2)],
        *_goodput_rows(report),
        ["output tokens/s", _number(figures["output_throughput"], 1)],
        ["best second, output tokens", _number(figures["max_output_tokens_per_s"])],
        ["input tokens/s", _number(figures["input_throughput"], 1)],
        ["total tokens/s", _number(figures["total_token_throughput"], 1)],
        *_arrival_row(figures),
        ["most requests at once", _number(figures["max_concurrent_requests"])],
        *_prompt_row(figures),
        *_adapter_rows(figures),
    ]
    for error, count in errors_of(report.runs).items():
        rows.append([f"error {error}", str(count)])
    return rows


def _goodput_rows(report: Report) -> list[list[str]]:
    figures = report.figures
    if figures["good_share"] is None:
        return []
    names = {key: title for title, key in LATENCIES.items()}
    shares = [f"all {figures['good_share']:.0%}"]
    for key, limit in report.slo.items():
        shares.append(f"{names[key]} <= {limit:g} ms {figures[f'good_{key}_share'] or 0.0:.0%}")
    return [
        ["goodput, requests/s", _number(figures["request_goodput"], 2)],
        ["requests that met the objectives", ", ".join(shares)],
    ]


def _arrival_row(figures: Figures) -> list[list[str]]:
    """Where several tokens come together: drafts that were confirmed, or a client that is late."""
    if (figures["tokens_per_arrival"] or 1) < 1.05:
        return []
    return [["output tokens in one arrival", _number(figures["tokens_per_arrival"], 2)]]


def _prompt_row(figures: Figures) -> list[list[str]]:
    cached, tokens = figures["cached_input_tokens"], figures["total_input_tokens"]
    if not cached or not tokens:
        return []
    return [["prompt tokens from the cache", f"{_number(cached)} ({cached / tokens:.0%})"]]


def _adapter_rows(figures: Figures) -> list[list[str]]:
    if not figures["cold_requests"] and not figures["warm_requests"]:
        return []
    cold, warm = (
        f"{_number(figures[f'median_ttft_{kind}_ms'], 1)} ({_number(figures[f'{kind}_requests'])})"
        for kind in ("cold", "warm")
    )
    low, high = (_number(figures[f"{end}_adapter_tokens"]) for end in ("min", "max"))
    rows = [["TTFT p50 (ms), adapter not resident / resident", f"{cold} / {warm}"]]
    if (figures["adapters_asked_for"] or 0) > 1:
        rows.append(["adapters asked for", _number(figures["adapters_asked_for"])])
        rows.append(["output tokens of an adapter, least / most", f"{low} / {high}"])
        rows.append(["Jain's index of them", _number(figures["jain_index"], 3)])
        demand = _number(figures["jain_index_of_demand"], 3)
        rows.append(["the same, of tokens over those asked for", demand])
    if (figures["backlogged_seconds"] or 0) >= 1:  # less says nothing
        seconds = _number(figures["backlogged_seconds"], 2)
        index = _number(figures["jain_index_backlogged"], 3)
        rows.append(["Jain's index while requests of all waited", f"{index} (of {seconds} s)"])
    return rows


def _adapter_table(title: str, adapters: Mapping[str, Figures]) -> str:
    header = [title, "requests", "failed", "tokens", "of those wanted"]
    rows = [
        [
            name,
            _number(each["requests"]),
            _number(each["failed"]),
            _number(each["output_tokens"]),
            f"{(each['output_tokens'] or 0) / (each['wanted_tokens'] or 1):.0%}",
            _number(each["median_ttft_ms"], 1),
            _number(each["p99_ttft_ms"], 1),
            _number(each["p99_itl_ms"], 1),
        ]
        for name, each in adapters.items()
    ]
    return table([*header, "TTFT p50", "TTFT p99", "ITL p99"], rows)


def _repeats(report: Report) -> str:
    rates = [run["output_throughput"] or 0.0 for run in report.by_run]
    middle = report.figures["output_throughput"] or math.inf
    apart = (max(rates) - min(rates)) / middle
    return f"Medians of {len(rates)} runs; their output tokens/s lie up to {apart:.0%} apart."


def _conditions(report: Report) -> str:
    server = "a server of its own" if report.settings["own_server"] else "a server that was there"
    return (
        f"{report.title}; seed {report.settings['seed']}. {server.capitalize()}; the client: "
        f"{in_words(report.environment)}\n`{report.environment['command']}`"
    )


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _whole(value: float | None) -> float | None:
    """Medians of counts are counts, unless they lie between two."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _jsonable(value: Any) -> Any:
    """JSON has no infinity; vLLM's tool writes it as a word."""
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return value if value is None or isinstance(value, int | float | list) else str(value)


def _in_seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
