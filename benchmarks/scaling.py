"""What do tokens cost as the work grows: more rows, more adapters, longer contexts?

python benchmarks/scaling.py --help
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plots
from child import BenchmarkError
from cliffs import Point, lowest
from closed_loop import Clients, Prompts, stop
from command import (
    RESULTS,
    Check,
    Findings,
    build_parser,
    number,
    positive,
    progress,
    run_command,
    table,
)
from figures import Arrival, decode_rate
from lifecycle import make_resident
from loraplex_client import AsyncClient
from pulse import Pulse
from scenario import Once, Scene, all_decode, scene, until
from workload import Request

DESCRIPTION = """\
Decode tokens a second against what makes a step dearer: the batch, without adapters and with eight;
the number of adapters in a full batch; the length of the contexts of eight rows. Each point: as
many streams as the batch, all sent at once; what counts is the time in which all of them decode.
"""

EPILOG = """\
No point may lie more than 15% below the straight line between its neighbours on logarithmic axes,
nor, where the batch grows, below the point before; elsewhere the rate may fall no faster than a
step's cost in proportion to the work would make it fall.
With --save there is a picture too: results/NAME.png.

examples:
  python benchmarks/scaling.py --save scaling
  python benchmarks/scaling.py --batches 1,8 --adapters 1,8 --contexts 128,512 --rounds 1
"""

LIMIT = 0.85
"""A point's rate over the least that is no cliff."""

BATCH_ADAPTERS = 8
CONTEXT_BATCH = 8
SHORT_PROMPT = 64
MAX_TOKENS = 2048
"""Out of a stream at most: the first ones wait for the last one's prompt."""

ROOM_TOKENS = 768
"""Of KV for what a stream generates, on average."""

SECONDS_TO_SETTLE = 0.3


class Shape(NamedTuple):
    """What runs together in one point."""

    batch: int
    adapters: int  # 0: the bare base
    prompt_tokens: int


class Curve(NamedTuple):
    """One line of the picture."""

    name: str
    axis: str  # what grows
    shapes: Mapping[int, Shape]  # by how much of it


class Sample(NamedTuple):
    """One measurement of a point."""

    rate: float  # tokens/s
    context: float  # tokens of a row, on average, in the middle of the measurement


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("scaling.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    for flag, values, what in (
        ("--batches", [1, 2, 4, 8, 16, 32, 64], "rows in a step"),
        ("--adapters", [1, 2, 4, 8, 16, 32, 64], "in the largest batch, at most one a row"),
        ("--contexts", [128, 256, 512, 1024, 2048, 4096], "tokens in each of eight prompts"),
    ):
        shown = ",".join(map(str, values))
        help_ = f"{what} (default: {shown})"
        group.add_argument(flag, type=ascending, default=values, metavar="N,...", help=help_)
    number(group, "--tokens", 48, "out of each stream, while all decode")
    number(group, "--rounds", 3, "of all points; medians count")
    return parser


def ascending(text: str) -> list[int]:
    """Numbers, each once."""
    numbers = sorted({positive(part) for part in text.split(",")})
    if len(numbers) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers or more")
    return numbers


def _benchmark(args: argparse.Namespace) -> Findings:
    if args.save is not None:
        plots.require()
    curves = curves_of(args.batches, args.adapters, args.contexts)
    shapes = list(dict.fromkeys(shape for curve in curves for shape in curve.shapes.values()))
    tokens = max(shape.batch * (shape.prompt_tokens + ROOM_TOKENS) for shape in shapes)
    num_adapters = max(shape.adapters for shape in shapes)
    batch = max(shape.batch for shape in shapes)
    with scene(args, num_adapters, kv_tokens=tokens, max_running=batch) as at:
        samples, cpu_share = asyncio.run(_measure(args, at, shapes))
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        draw(RESULTS / f"{args.save}.png", curves, samples)
    return _findings(curves, samples, cpu_share)


def curves_of(
    batches: Sequence[int], adapters: Sequence[int], contexts: Sequence[int]
) -> list[Curve]:
    """Small batches have an adapter a row where there are not rows enough for eight."""
    full = batches[-1]
    return [
        Curve("base only", "batch", {b: Shape(b, 0, SHORT_PROMPT) for b in batches}),
        Curve(
            f"{BATCH_ADAPTERS} adapters",
            "batch",
            {b: Shape(b, min(b, BATCH_ADAPTERS), SHORT_PROMPT) for b in batches},
        ),
        Curve(
            f"batch {full}",
            "adapters",
            {n: Shape(full, n, SHORT_PROMPT) for n in adapters if n <= full},
        ),
        Curve(
            f"batch {CONTEXT_BATCH}, {BATCH_ADAPTERS} adapters",
            "context",
            {c: Shape(CONTEXT_BATCH, BATCH_ADAPTERS, c) for c in contexts},
        ),
    ]


async def _measure(
    args: argparse.Namespace, at: Scene, shapes: Sequence[Shape]
) -> tuple[dict[Shape, list[Sample]], float]:
    """Every shape's samples, and the client's share of a core."""
    samples: dict[Shape, list[Sample]] = {shape: [] for shape in shapes}
    pulse = Pulse()
    async with AsyncClient(at.server.target) as client:
        vocab_size = (await client.server_info()).vocab_size
        await make_resident(client, at.adapters)
        await _sample(args, at, client, shapes[-1]._replace(prompt_tokens=1), vocab_size)
        async with pulse.beating(lambda: None):
            for round_ in range(args.rounds):
                # Every other round backwards, so that a drift does not favour the same ones.
                for shape in shapes if round_ % 2 == 0 else reversed(shapes):
                    sample = await _sample(args, at, client, shape, vocab_size)
                    samples[shape].append(sample)
                    progress(
                        f"round {round_ + 1}: batch {shape.batch}, {shape.adapters} adapters, "
                        f"context {sample.context:.0f}: {sample.rate:.0f} tokens/s"
                    )
    return samples, pulse.cpu_share


async def _sample(
    args: argparse.Namespace, at: Scene, client: AsyncClient, shape: Shape, vocab_size: int
) -> Sample:
    """Long prompts are sent once ahead: with a prefix cache the streams then begin together, and
    not while the first of them wait for the last one's prompt."""
    prompts = Prompts(vocab_size, shape.prompt_tokens, args.seed)
    names: Sequence[str | None] = at.adapters[: shape.adapters] or [None]
    requests = [
        Request(prompts.next(), names[i % len(names)], MAX_TOKENS) for i in range(shape.batch)
    ]
    if shape.prompt_tokens > SHORT_PROMPT:
        ahead = [request._replace(max_tokens=1) for request in requests]
        await Clients(client, shape.batch).run(Once(ahead))
    clients = Clients(client, shape.batch)
    streams = asyncio.create_task(clients.run(Once(requests)))
    try:
        await until(lambda: all_decode(clients.outcomes, shape.batch), streams)
        before = [outcome.num_tokens for outcome in clients.outcomes]

        def is_enough() -> bool:
            pairs = zip(clients.outcomes, before, strict=True)
            return all(outcome.num_tokens - begun >= args.tokens for outcome, begun in pairs)

        await until(is_enough, streams)
    finally:
        await stop(streams)
    await asyncio.sleep(SECONDS_TO_SETTLE)  # until the server has left them, too
    rate = decode_rate(
        [tuple(map(Arrival, each.arrivals, each.counts)) for each in clients.outcomes]
    )
    if rate is None:
        raise BenchmarkError("the streams did not decode together")
    generated = statistics.mean(before) + args.tokens / 2
    return Sample(rate, shape.prompt_tokens + generated)


def points(curve: Curve, samples: Mapping[Shape, Sequence[Sample]]) -> list[Point]:
    """Medians of the rounds."""
    return [
        Point(work, statistics.median(sample.rate for sample in samples[shape]))
        for work, shape in curve.shapes.items()
    ]


def _findings(
    curves: Sequence[Curve], samples: Mapping[Shape, Sequence[Sample]], cpu_share: float
) -> Findings:
    tables, checks = [], []
    record: dict[str, Any] = {"client_cpu_share": cpu_share}
    for curve in curves:
        title = f"{curve.axis}, {curve.name}"
        found = points(curve, samples)
        worst = lowest(found, curve.axis == "batch")
        rows = [_cells(point, curve.shapes[int(point.work)], samples) for point in found]
        header = [title, "tokens/s", "ms a step", "rounds lie apart"]
        tables.append(table(header, rows))
        what = f"{title}: lowest point over what is no cliff, at {worst.work:g}"
        checks.append(Check(what, worst.ratio, LIMIT, at_most=False))
        record[title] = [
            {
                "work": point.work,
                **shape._asdict(),
                "samples": [s._asdict() for s in samples[shape]],
            }
            for point, shape in zip(found, curve.shapes.values(), strict=True)
        ]
    text = (
        "\n\n".join(tables) + f"\n\nThe client's event loop took {cpu_share:.0%} of one core, "
        "all points together."
    )
    return Findings(text, record, checks)


def _cells(point: Point, shape: Shape, samples: Mapping[Shape, Sequence[Sample]]) -> list[str]:
    rates = [sample.rate for sample in samples[shape]]
    return [
        f"{point.work:g}",
        f"{point.rate:.0f}",
        f"{1000 * shape.batch / point.rate:.1f}",
        f"{(max(rates) - min(rates)) / point.rate:.0%}",
    ]


def draw(path: Path, curves: Sequence[Curve], samples: Mapping[Shape, Sequence[Sample]]) -> None:
    """A panel for each thing that grows: medians as a line, rounds as dots."""
    from matplotlib.figure import Figure

    axes_of = list(dict.fromkeys(curve.axis for curve in curves))
    figure = Figure(figsize=(4.5 * len(axes_of), 3.6), layout="constrained")
    panels = dict(zip(axes_of, figure.subplots(1, len(axes_of)), strict=True))
    for curve in curves:
        panel = panels[curve.axis]
        found = points(curve, samples)
        [line] = panel.plot(
            [p.work for p in found], [p.rate for p in found], marker="o", label=curve.name
        )
        for work, shape in curve.shapes.items():
            rates = [sample.rate for sample in samples[shape]]
            panel.plot([work] * len(rates), rates, ".", color=line.get_color(), alpha=0.4)
        panel.set_xscale("log", base=2)
        ticks = [p.work for p in found]
        panel.set_xticks(ticks, [f"{work:g}" for work in ticks])
        panel.set_ylim(bottom=0)
        panel.set_xlabel(curve.axis)
        panel.legend()
    panels[axes_of[0]].set_ylabel("decode tokens/s")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
