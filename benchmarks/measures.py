"""From what happened to each request to figures: latencies, rates, goodput, fairness.

Latencies are in milliseconds. Keys that `vllm bench serve --save-result` has mean what they mean
there; the others are ours. A run that was cut off also has requests without an end: their tokens,
first tokens and pauses count, and whatever else is not known of them is in no figure.

ttft  from being due to the first token
tpot  from the first token to the last, over the tokens after the first
itl   between two arrivals of tokens (one arrival may bring several)
e2el  from being due to the end of the stream
"""

import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise

from figures import percentile
from load import Run
from outcome import Outcome

Figures = dict[str, float | None]
"""None where there was nothing to measure."""

BASE = "(base)"
"""The bare base among the adapters."""

SLO_KEYS = ("ttft", "tpot", "e2el")
PERCENTS = (90, 99)


def ttft(outcome: Outcome) -> float | None:
    return outcome.first_token * 1e3 if outcome.arrivals else None


def tpot(outcome: Outcome) -> float | None:
    """None for an answer of one arrival."""
    more = outcome.num_tokens - outcome.counts[0] if outcome.counts else 0
    return (outcome.arrivals[-1] - outcome.arrivals[0]) * 1e3 / more if more else None


def itl(outcome: Outcome) -> list[float]:
    return [(after - before) * 1e3 for before, after in pairwise(outcome.arrivals)]


def e2el(outcome: Outcome) -> float | None:
    return None if outcome.ended is None else (outcome.ended - outcome.due) * 1e3


def lateness(outcome: Outcome) -> float | None:
    """How long after it was due it went out; None: it never did."""
    return None if outcome.sent is None else (outcome.sent - outcome.due) * 1e3


def name_of(outcome: Outcome) -> str:
    return outcome.request.adapter or BASE


def figures_of(run: Run, slo: Mapping[str, float]) -> Figures:
    """Everything that is one number; `slo` holds milliseconds by SLO_KEYS."""
    done = [outcome for outcome in run.outcomes if outcome.is_complete]
    return {
        **_counts(run, done),
        **_rates(run),
        **_goodput(run, done, slo),
        **_latencies([*_served(run)], done),
        **_cold_and_warm(done),
        **_fairness(run),
        **_client(run),
    }


def median_figures(runs: Sequence[Figures]) -> Figures:
    """Each figure's median over the runs that have it."""
    medians: Figures = {}
    for key in runs[0]:
        known = [value for run in runs if (value := run[key]) is not None]
        medians[key] = statistics.median(known) if known else None
    return medians


def spread(name: str, values: Sequence[float]) -> Figures:
    """Mean, median, deviation (of the whole, not of a sample) and percentiles, as vLLM names
    them."""
    some = bool(values)
    figures: Figures = {
        f"mean_{name}_ms": statistics.fmean(values) if some else None,
        f"median_{name}_ms": statistics.median(values) if some else None,
        f"std_{name}_ms": statistics.pstdev(values) if some else None,
    }
    for percent in PERCENTS:
        figures[f"p{percent}_{name}_ms"] = percentile(values, percent) if some else None
    return figures


def _counts(run: Run, done: Sequence[Outcome]) -> Figures:
    failed = sum(outcome.error is not None for outcome in run.outcomes)
    return {
        "duration": run.seconds,
        "completed": len(done),
        "failed": failed,
        "unfinished": len(run.outcomes) - len(done) - failed,
        "unstarted": sum(each.ended is None and not each.arrivals for each in run.outcomes),
        "wrong_length": sum(each.num_tokens != each.request.max_tokens for each in done),
        "total_input_tokens": sum(len(each.request.token_ids) for each in _served(run)),
        "total_output_tokens": sum(each.num_tokens for each in _served(run)),
        "cached_input_tokens": sum(each.cached_tokens for each in _served(run)),
    }


def _served(run: Run) -> Iterator[Outcome]:
    """All that got a token and did not fail: where nothing is cut off, the completed."""
    return (each for each in run.outcomes if each.arrivals and each.error is None)


def _rates(run: Run) -> Figures:
    inputs = sum(len(each.request.token_ids) for each in _served(run))
    outputs = sum(each.num_tokens for each in _served(run))
    arrivals = sum(len(each.arrivals) for each in _served(run))
    return {
        "request_throughput": sum(each.is_complete for each in run.outcomes) / run.seconds,
        "input_throughput": inputs / run.seconds,
        "output_throughput": outputs / run.seconds,
        "total_token_throughput": (inputs + outputs) / run.seconds,
        "tokens_per_arrival": outputs / arrivals if arrivals else None,
        "max_output_tokens_per_s": max(tokens_by_second(run), default=0),
        "max_concurrent_requests": _most_at_once(run),
    }


def tokens_by_second(run: Run) -> list[int]:
    """How many arrived in each second of the run; its last one is not whole."""
    buckets = Counter[int]()
    for outcome in _served(run):
        for moment, count in zip(outcome.arrivals, outcome.counts, strict=True):
            buckets[int(moment - run.start)] += count
    return [buckets[second] for second in range(max(buckets, default=-1) + 1)]


def _most_at_once(run: Run) -> int:
    """Requests that had been sent and had not ended."""
    changes = [(each.sent, 1) for each in run.outcomes if each.sent is not None]
    changes += [(each.ended, -1) for each in run.outcomes if each.ended is not None]
    return max(accumulate(change for _, change in sorted(changes)), default=0)


def _goodput(run: Run, done: Sequence[Outcome], slo: Mapping[str, float]) -> Figures:
    """Requests a second that met all objectives, and the shares of those that ended, be it by an
    error, that met all of them, or one.
    """
    if not slo:
        return {"request_goodput": None, "good_share": None}
    ended = sum(outcome.ended is not None for outcome in run.outcomes) or 1
    good = sum(is_good(outcome, slo) for outcome in done)
    return {
        "request_goodput": good / run.seconds,
        "good_share": good / ended,
        **{
            f"good_{key}_share": sum(is_good(outcome, {key: most}) for outcome in done) / ended
            for key, most in slo.items()
        },
    }


def is_good(outcome: Outcome, slo: Mapping[str, float]) -> bool:
    """A request that failed is not; one with a single token has a TPOT of 0."""
    if not outcome.is_complete:
        return False
    found = {"ttft": ttft(outcome), "tpot": tpot(outcome) or 0.0, "e2el": e2el(outcome)}
    return all((value := found[key]) is not None and value <= most for key, most in slo.items())


def _latencies(served: Sequence[Outcome], done: Sequence[Outcome]) -> Figures:
    timed = [outcome.timings for outcome in done if outcome.timings is not None]
    return {
        **spread("ttft", _known(map(ttft, served))),
        **spread("tpot", _known(map(tpot, done))),
        **spread("itl", [gap for outcome in served for gap in itl(outcome)]),
        **spread("e2el", _known(map(e2el, done))),
        **spread("queue", [timings.queue * 1e3 for timings in timed]),
        **spread("adapter_wait", [timings.adapter_wait * 1e3 for timings in timed]),
    }


def is_cold(outcome: Outcome) -> bool:
    """Its adapter was not in device memory when the request came: the server says how long it
    waited for it, and that is 0 for one that is resident.
    """
    return outcome.timings is not None and outcome.timings.adapter_wait > 0


def _cold_and_warm(done: Sequence[Outcome]) -> Figures:
    asked = [outcome for outcome in done if outcome.request.adapter is not None]
    cold = [outcome for outcome in asked if is_cold(outcome)]
    warm = [outcome for outcome in asked if not is_cold(outcome)]
    return {
        "cold_requests": len(cold),
        "warm_requests": len(warm),
        **spread("ttft_cold", _known(map(ttft, cold))),
        **spread("ttft_warm", _known(map(ttft, warm))),
    }


def jain_index(shares: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2): 1 where all have the same, 1/n where one has all.

    Jain, Chiu and Hawe, "A quantitative measure of fairness", DEC-TR-301 (1984). None for nothing.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def tokens_by_adapter(run: Run) -> dict[str, int]:
    """Output tokens of every adapter that was asked for."""
    tokens = {name_of(outcome): 0 for outcome in run.outcomes}
    for outcome in run.outcomes:
        tokens[name_of(outcome)] += outcome.num_tokens
    return tokens


def _fairness(run: Run) -> Figures:
    tokens = tokens_by_adapter(run)
    wanted = Counter[str]()
    for outcome in run.outcomes:
        wanted[name_of(outcome)] += outcome.request.max_tokens
    windows = backlogged(run)
    contested = dict.fromkeys(tokens, 0)
    begins = [begin for begin, _ in windows]
    for outcome in run.outcomes:
        for moment, count in zip(outcome.arrivals, outcome.counts, strict=True):
            window = bisect_right(begins, moment) - 1
            if window >= 0 and moment < windows[window][1]:
                contested[name_of(outcome)] += count
    return {
        "adapters_asked_for": len(tokens),
        "min_adapter_tokens": min(tokens.values(), default=None),
        "max_adapter_tokens": max(tokens.values(), default=None),
        "jain_index": jain_index(list(tokens.values())),
        "jain_index_of_demand": jain_index([tokens[name] / wanted[name] for name in tokens]),
        "backlogged_seconds": sum(end - begin for begin, end in windows),
        "jain_index_backlogged": jain_index(list(contested.values())),
    }


def backlogged(run: Run) -> list[tuple[float, float]]:
    """The spans in which every adapter had a request that waited for its first token.

    Only there does it say something about a scheduler that one got more than another: elsewhere
    some simply asked for less.
    """
    changes: list[tuple[float, int, str]] = []
    for outcome in run.outcomes:
        until = outcome.arrivals[0] if outcome.arrivals else outcome.ended or run.end
        changes += [(outcome.due, 1, name_of(outcome)), (until, -1, name_of(outcome))]
    waiting = dict.fromkeys(tokens_by_adapter(run), 0)
    num_idle, begin = len(waiting), run.start
    windows: list[tuple[float, float]] = []
    for moment, change, name in sorted(changes):
        was_all = num_idle == 0
        num_idle -= waiting[name] == 0
        waiting[name] += change
        num_idle += waiting[name] == 0
        if was_all and num_idle and moment > begin:
            windows.append((begin, moment))
        elif not was_all and not num_idle:
            begin = moment
    return windows


def _client(run: Run) -> Figures:
    late = _known(map(lateness, run.outcomes))
    return {
        "client_cpu_share": run.cpu_share,
        "p99_client_lag_ms": percentile(run.lags, 99) * 1e3 if run.lags else None,
        "p99_client_lateness_ms": percentile(late, 99) if late else None,
    }


def errors_of(runs: Iterable[Run]) -> dict[str, int]:
    """How often each gRPC code and reason was met, most often first."""
    found = Counter(each.error for run in runs for each in run.outcomes if each.error is not None)
    return dict(found.most_common())


def adapters_of(runs: Sequence[Run]) -> dict[str, Figures]:
    """What each adapter got, over all runs; latencies are medians and 99th percentiles."""
    by_name: dict[str, list[Outcome]] = defaultdict(list)
    for run in runs:
        for outcome in run.outcomes:
            by_name[name_of(outcome)].append(outcome)
    return {name: _adapter(by_name[name]) for name in sorted(by_name)}


def _adapter(outcomes: Sequence[Outcome]) -> Figures:
    served = [outcome for outcome in outcomes if outcome.error is None]
    first, gaps = _known(map(ttft, served)), [gap for outcome in served for gap in itl(outcome)]
    return {
        "requests": len(outcomes),
        "completed": sum(outcome.is_complete for outcome in outcomes),
        "failed": sum(outcome.error is not None for outcome in outcomes),
        "wanted_tokens": sum(outcome.request.max_tokens for outcome in outcomes),
        "output_tokens": sum(outcome.num_tokens for outcome in outcomes),
        "median_ttft_ms": statistics.median(first) if first else None,
        "p99_ttft_ms": percentile(first, 99) if first else None,
        "p99_itl_ms": percentile(gaps, 99) if gaps else None,
    }


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
