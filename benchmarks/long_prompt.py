"""Do running streams stall while a long prompt is prefilled among them?

python benchmarks/long_prompt.py --help
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from closed_loop import Clients, Prompts, pauses_within, stop, tokens_within
from command import Check, Findings, build_parser, number, progress, run_command, table
from figures import percentile
from lifecycle import make_resident
from loraplex_client import AsyncClient
from outcome import Outcome
from pulse import Pulse
from scenario import Once, Scene, all_decode, scene, until
from workload import Request

DESCRIPTION = """\
Sixteen streams decode, two on each of eight adapters. Then a prompt of 4,096 tokens comes, and
another one when it is answered, until enough gaps between tokens of the streams fall into the time
from a long prompt's sending to its first token. Before the first and after each lies a quiet window
of the same length. Compared are the gaps in those windows: streams, clients and contexts are the
same ones, only the prefill comes and goes.
"""

EPILOG = """\
A gap belongs to a window that it reaches into, with its whole length. Every long prompt is new:
no prefix cache has anything to give. One long prompt more, ahead of the first run, is not counted.

examples:
  python benchmarks/long_prompt.py --save long_prompt
  python benchmarks/long_prompt.py --runs 1 --gaps 50 --long-tokens 1024       # a quick look
"""

LIMIT = 2.0
"""The 99th percentile of the gaps while a long prompt is prefilled, over the median gap without."""

GAPS, RUNS = 500, 5
"""Fewer say little."""

MAX_LONG_PROMPTS = 20
LONG_OUTPUT = 8
MIN_QUIET_SECONDS = 1.5
SECONDS_TO_SETTLE = 0.3

Window = tuple[float, float]


@dataclass(slots=True)
class Run:
    """The same streams with and without a long prompt; moments are of `time.monotonic`."""

    outcomes: list[Outcome] = field(default_factory=list)
    quiet: list[Window] = field(default_factory=list)
    prefill: list[Window] = field(default_factory=list)
    cpu_share: float = 0.0  # the client's, of one core

    def gaps(self, windows: Sequence[Window]) -> list[float]:
        return pauses_within(self.outcomes, windows)

    def rate(self, windows: Sequence[Window]) -> float:
        """Tokens a second of all streams together."""
        tokens = sum(tokens_within(self.outcomes, *window) for window in windows)
        return tokens / sum(end - begin for begin, end in windows)


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("long_prompt.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--streams", 16, "that run at once")
    number(group, "--adapters", 8, "that they run on")
    number(group, "--prompt-tokens", 64, "in each stream's prompt")
    number(group, "--stream-tokens", 2048, "out of each stream at most, in a run")
    number(group, "--long-tokens", 4096, "in the long prompt")
    number(group, "--gaps", GAPS, "of the streams while long prompts are prefilled, in a run")
    number(group, "--runs", RUNS, "each with streams of its own")
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    streams = args.streams * (args.prompt_tokens + args.stream_tokens)
    long = 2 * (args.long_tokens + LONG_OUTPUT)
    with scene(args, args.adapters, kv_tokens=streams + long) as at:
        runs = asyncio.run(_measure(args, at))
    return _findings(runs)


async def _measure(args: argparse.Namespace, at: Scene) -> list[Run]:
    async with AsyncClient(at.server.target) as client:
        vocab_size = (await client.server_info()).vocab_size
        await make_resident(client, at.adapters)
        short = Prompts(vocab_size, args.prompt_tokens, args.seed)
        long = Prompts(vocab_size, args.long_tokens, args.seed + 1)
        progress("a run that is not counted")
        await _run(args, at, client, short, long, num_gaps=1)
        runs = []
        for index in range(args.runs):
            run = await _run(args, at, client, short, long, args.gaps)
            runs.append(run)
            progress(f"run {index + 1}: {_line(figures_of(run))}")
        return runs


async def _run(
    args: argparse.Namespace,
    at: Scene,
    client: AsyncClient,
    short: Prompts,
    long: Prompts,
    num_gaps: int,
) -> Run:
    run, clients, pulse = Run(), Clients(client, args.streams), Pulse()
    run.outcomes = clients.outcomes
    requests = [
        Request(short.next(), at.adapters[index % len(at.adapters)], args.stream_tokens)
        for index in range(args.streams)
    ]
    streams = asyncio.create_task(clients.run(Once(requests)))
    try:
        await until(lambda: all_decode(run.outcomes, args.streams), streams)
        async with pulse.beating(lambda: None):
            await _quiet(run, MIN_QUIET_SECONDS, streams)
            while len(run.gaps(run.prefill)) < num_gaps and len(run.prefill) < MAX_LONG_PROMPTS:
                adapter = at.adapters[len(run.prefill) % len(at.adapters)]
                request = Request(long.next(), adapter, LONG_OUTPUT)
                [outcome] = await Clients(client, 1).run(Once([request]))
                run.prefill.append((outcome.due, outcome.arrivals[0]))
                await _quiet(run, max(MIN_QUIET_SECONDS, outcome.first_token), streams)
    finally:
        await stop(streams)
    run.cpu_share = pulse.cpu_share
    return run


async def _quiet(run: Run, seconds: float, streams: "asyncio.Task[list[Outcome]]") -> None:
    await asyncio.sleep(SECONDS_TO_SETTLE)
    begin = time.monotonic()
    await until(lambda: time.monotonic() > begin + seconds, streams)
    run.quiet.append((begin, time.monotonic()))


def figures_of(run: Run) -> dict[str, float]:
    quiet, prefill = run.gaps(run.quiet), run.gaps(run.prefill)
    return {
        "gaps": len(prefill),
        "quiet_gaps": len(quiet),
        **{f"quiet_p{p}_ms": 1000 * percentile(quiet, p) for p in (50, 99)},
        **{f"prefill_p{p}_ms": 1000 * percentile(prefill, p) for p in (50, 99, 100)},
        "p99_of_p50": percentile(prefill, 99) / percentile(quiet, 50),
        "p99_of_p99": percentile(prefill, 99) / percentile(quiet, 99),
        "long_prompts": len(run.prefill),
        "ttft_seconds": statistics.median(end - begin for begin, end in run.prefill),
        "quiet_tokens_per_second": run.rate(run.quiet),
        "prefill_tokens_per_second": run.rate(run.prefill),
        "client_cpu_share": run.cpu_share,
    }


def _line(figures: Mapping[str, float]) -> str:
    return (
        f"{figures['long_prompts']} long prompts, {figures['gaps']} gaps, p99 "
        f"{figures['prefill_p99_ms']:.0f} ms, {figures['p99_of_p50']:.2f}x the median without"
    )


def _findings(runs: Sequence[Run]) -> Findings:
    figures = [figures_of(run) for run in runs]
    rows = [[f"{index}", *_cells(each)] for index, each in enumerate(figures, 1)]
    header = [
        *("run", "gaps without", "p50 ms", "p99 ms", "gaps beside prefill", "p50 ms", "p99 ms"),
        *("longest ms", "p99 over p50 without", "over p99 without", "long prompts' TTFT s"),
        *("streams' tokens/s without", "beside prefill"),
    ]
    worst = max(each["p99_of_p50"] for each in figures)
    kept = [each["prefill_tokens_per_second"] / each["quiet_tokens_per_second"] for each in figures]
    busy = max(each["client_cpu_share"] for each in figures)
    text = (
        f"{table(header, rows)}\n\n"
        f"While a long prompt is prefilled, the streams keep {statistics.median(kept):.0%} of "
        f"their tokens a second. The client's event loop took {busy:.0%} of one core at most."
    )
    checks = [
        Check("p99 of the gaps beside prefill over the median without, worst run", worst, LIMIT),
        Check("gaps beside prefill, fewest in a run", min(e["gaps"] for e in figures), GAPS, False),
        Check("runs", len(runs), RUNS, at_most=False),
    ]
    record: dict[str, Any] = {"runs": figures, "streams_kept": kept}
    return Findings(text, record, checks)


def _cells(each: Mapping[str, float]) -> list[str]:
    return [
        f"{each['quiet_gaps']}",
        *(f"{each[f'quiet_p{p}_ms']:.1f}" for p in (50, 99)),
        f"{each['gaps']}",
        *(f"{each[f'prefill_p{p}_ms']:.1f}" for p in (50, 99, 100)),
        f"{each['p99_of_p50']:.2f}",
        f"{each['p99_of_p99']:.2f}",
        f"{each['ttft_seconds']:.2f}",
        f"{each['quiet_tokens_per_second']:.0f}",
        f"{each['prefill_tokens_per_second']:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
