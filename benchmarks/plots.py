"""One PNG of a run: latencies, throughput over time, what each adapter got.

matplotlib is imported when something is drawn, and not before.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from child import BenchmarkError
from load import Run
from measures import is_cold, itl, tokens_by_adapter, tokens_by_second, ttft
from outcome import Outcome

MOST_NAMED = 16
"""More adapters than that get no names under their bars."""


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def require() -> None:
    """BenchmarkError where there is no matplotlib: before an hour of measuring, not after."""
    if not can_plot():
        raise BenchmarkError("plots need matplotlib: pip install matplotlib, or --no-plot")


def save(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draws all runs into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    figure.suptitle("\n".join(wrap(title, 130)), fontsize=10)
    served = [outcome for run in runs for outcome in run.outcomes if outcome.error is None]
    _first_tokens(axes[0, 0], served)
    _pauses(axes[0, 1], served)
    _throughput(axes[1, 0], runs)
    _service(axes[1, 1], runs)
    figure.savefig(path, dpi=110, format="png")


def _first_tokens(axes: Any, served: Sequence[Outcome]) -> None:
    """Of all requests, and apart of those whose adapter was not resident, if there are both."""
    cold, warm = _values(ttft, filter(is_cold, served)), _values(ttft, served)
    _distribution(axes, warm, "all")
    if cold and len(cold) < len(warm):
        _distribution(axes, cold, "adapter not resident")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xlim(left=0)
    _label(axes, "Time to first token", "ms", "share of requests")


def _pauses(axes: Any, served: Sequence[Outcome]) -> None:
    gaps = [gap for outcome in served for gap in itl(outcome)]
    _distribution(axes, gaps, "all")
    if gaps and max(gaps) > 20 * sorted(gaps)[len(gaps) // 2] > 0:
        axes.set_xscale("log")
    _label(axes, "Pauses between tokens (ITL)", "ms", "share of pauses")


def _throughput(axes: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs, 1):
        buckets = tokens_by_second(run)[: max(1, int(run.seconds))]  # whole seconds
        middles = [second + 0.5 for second in range(len(buckets))]
        axes.plot(middles, buckets, linewidth=1.2, label=f"run {number}")
    if len(runs) > 1:
        axes.legend(loc="lower right", fontsize=8)
    axes.set_ylim(bottom=0)
    _label(axes, "Output tokens in each second", "s", "tokens")


def _service(axes: Any, runs: Sequence[Run]) -> None:
    """Least first: a fair scheduler under equal demand draws a level line."""
    tokens: dict[str, int] = {}
    for run in runs:
        for name, count in tokens_by_adapter(run).items():
            tokens[name] = tokens.get(name, 0) + count
    names = sorted(tokens, key=lambda name: tokens[name])
    axes.bar(range(len(names)), [tokens[name] for name in names])
    if len(names) <= MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    _label(axes, "Output tokens of each adapter", "", "tokens")


def _distribution(axes: Any, values: Sequence[float], label: str) -> None:
    """The share of values that are at most x."""
    ordered = sorted(values)
    axes.step(
        ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", label=label
    )
    axes.set_ylim(0, 1.02)


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _values(
    measure: Callable[[Outcome], float | None], outcomes: "Sequence[Outcome] | filter[Outcome]"
) -> list[float]:
    return [value for outcome in outcomes if (value := measure(outcome)) is not None]
