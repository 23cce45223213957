"""The figures as a Markdown table for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from environment import in_words
from figures import Summary
from workload import Shape

OURS = "loraplex"
TITLES = {OURS: "Loraplex", "peft": "PEFT"}

Results = Mapping[Shape, Mapping[str, Summary]]
"""By shape and system; every shape has the same systems, Loraplex the first."""


def of_own_base(results: Results, shape: Shape, system: str) -> float | None:
    """Decode rate as a part of the same system's without adapters, at the same batch."""
    base = results.get(Shape(shape.batch, 0))
    if base is None or shape.num_adapters == 0:
        return None
    return _ratio(results[shape][system].decode, base[system].decode)


def times_peer(results: Results, shape: Shape, peer: str) -> float | None:
    """Loraplex's decode rate over the peer's."""
    return _ratio(results[shape][OURS].decode, results[shape][peer].decode)


def as_json(results: Results) -> list[dict[str, object]]:
    """One object a shape."""
    return [
        {
            "batch": shape.batch,
            "adapters": shape.num_adapters,
            "systems": {
                system: {**asdict(summary), "of_own_base": of_own_base(results, shape, system)}
                for system, summary in systems.items()
            },
            "times_peer": {
                peer: times_peer(results, shape, peer) for peer in systems if peer != OURS
            },
        }
        for shape, systems in results.items()
    ]


def markdown(results: Results) -> str:
    """A table, and how much the repeats of one wave differ, where there are any."""
    systems = list(next(iter(results.values())))
    rows = [_header(systems)]
    rows.append(["---:"] * len(rows[0]))
    rows += [_row(results, shape, systems) for shape in results]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    summaries = [summary for by_system in results.values() for summary in by_system.values()]
    if any(len(summary.end_to_end_waves) > 1 for summary in summaries):
        spread = max(summary.spread for summary in summaries)
        lines += ["", f"Repeats of one wave lie up to {spread:.0%} apart."]
    return "\n".join(lines)


def conditions(environment: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What a reader of the table alone must know."""
    return (
        f"{settings['model']}, {settings['dtype']}, prompts of {settings['prompt_tokens']} tokens, "
        f"{settings['max_tokens']} tokens out, adapters of rank {settings['rank']} on all seven "
        f"linears, {settings['threads']} torch threads. {in_words(environment)}"
    )


def _header(systems: Sequence[str]) -> list[str]:
    header = ["batch", "adapters"]
    for system in systems:
        columns = ("decode tok/s", "of own base", "TTFT ms p50 / p90", "end-to-end tok/s")
        header += [f"{TITLES[system]} {column}" for column in columns]
    return header + [f"Loraplex / {TITLES[peer]}, decode" for peer in systems if peer != OURS]


def _row(results: Results, shape: Shape, systems: Sequence[str]) -> list[str]:
    row = [str(shape.batch), str(shape.num_adapters)]
    for system in systems:
        summary = results[shape][system]
        row += [
            _number(summary.decode, ".1f"),
            _number(of_own_base(results, shape, system), ".2f"),
            f"{summary.first_token_median * 1000:.0f} / {summary.first_token_p90 * 1000:.0f}",
            _number(summary.end_to_end, ".1f"),
        ]
    peers = [peer for peer in systems if peer != OURS]
    return row + [_number(times_peer(results, shape, peer), ".2f") for peer in peers]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base is not None else None
