"""The figures as Markdown tables for people and as JSON for programs."""

from collections.abc import Mapping
from dataclasses import asdict

from agreement import ROWS, TOKENS, Agreement, Leading
from command import table
from figures import Summary
from peers.catalog import OURS, TITLES
from processes import Memory
from turns import Results
from verdicts import of_own_base
from waves import Shape

ONE_BY_ONE = "†"
CUT = "‡"

_NOTES = {
    ONE_BY_ONE: "requests did not all decode together: from the wave's first token to its last",
    CUT: "a wave was stopped at its time limit: of what came until then, and TTFT at least this",
}


def times_ours(results: Results, shape: Shape, peer: str) -> float | None:
    """Loraplex's decode rate over the peer's."""
    by_system = results[shape]
    return _ratio(by_system[OURS].decode, by_system[peer].decode) if OURS in by_system else None


def rates(results: Results) -> str:
    """A row a shape and system, what the marks mean, how much the repeats of one wave differ."""
    header = ["batch, adapters", "system", "decode tok/s", "of own base", "TTFT ms p50 / p90"]
    header += ["end-to-end tok/s", "Loraplex over it, decode"]
    rows = [_row(results, shape, name) for shape, found in results.items() for name in found]
    summaries = [summary for by_system in results.values() for summary in by_system.values()]
    marks = "".join(map(_marks, summaries))
    lines = [table(header, rows), ""]
    lines += [f"{mark} {note}." for mark, note in _NOTES.items() if mark in marks]
    repeated = [each.spread for each in summaries if len(each.end_to_end_waves) > 1]
    if repeated:
        lines.append(f"Repeats of one wave lie up to {max(repeated):.0%} apart.")
    return "\n".join(lines).strip()


def sizes(memory: Mapping[str, Memory]) -> str:
    header = ["processes of", "MB resident after the run (PSS)", "peak MB (RSS)"]
    rows = [[TITLES[name], f"{each.pss:.0f}", f"{each.peak:.0f}"] for name, each in memory.items()]
    return table(header, rows)


def tokens(agreements: Mapping[str, Agreement]) -> str:
    """What a reader needs to trust the rest."""
    references = list(next(iter(agreements.values())).leading)
    header = [f"leading tokens equal, of {TOKENS}: base / an adapter a row"]
    header += [f"as {TITLES[each]}" for each in references]
    header.append(f"rows of {ROWS} that adapters change")
    rows = []
    for name, each in agreements.items():
        found = [_pair(each.leading[reference]) for reference in references]
        changed = _number(each.changed, "d")
        changed += " (ignores its adapters)" if each.ignores_adapters else ""
        rows.append([TITLES[name], *found, changed])
    return table(header, rows)


def _pair(leading: Leading) -> str:
    return f"{leading.base:g}" + ("" if leading.mixed is None else f" / {leading.mixed:g}")


def as_json(results: Results) -> list[dict[str, object]]:
    """One object a shape."""
    return [
        {
            "batch": shape.batch,
            "adapters": shape.num_adapters,
            "systems": {
                name: {**asdict(summary), "of_own_base": of_own_base(results, shape, name)}
                for name, summary in by_system.items()
            },
            "loraplex_over": {
                name: times_ours(results, shape, name) for name in by_system if name != OURS
            },
        }
        for shape, by_system in results.items()
    ]


def _row(results: Results, shape: Shape, name: str) -> list[str]:
    summary = results[shape][name]
    times = None if name == OURS else times_ours(results, shape, name)
    return [
        f"{shape.batch}, {shape.num_adapters}",
        TITLES[name],
        f"{_number(summary.decode, '.1f')} {_marks(summary)}".strip(),
        _number(of_own_base(results, shape, name), ".2f"),
        f"{summary.first_token_median * 1000:.0f} / {summary.first_token_p90 * 1000:.0f}",
        _number(summary.end_to_end, ".1f"),
        _number(times, ".2f"),
    ]


def _marks(summary: Summary) -> str:
    return ONE_BY_ONE * summary.one_by_one + CUT * summary.cut


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
