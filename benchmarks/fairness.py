"""What is left for seven adapters when an eighth floods the server, and who gets what when all do.

python benchmarks/fairness.py --help
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from child import BenchmarkError
from command import Findings, build_parser, number, progress, run_command
from fairness_report import MIN_REQUESTS, Backlog, Flooded, Measured, findings
from figures import percentile
from lengths import Fixed, Lengths, Uniform
from lifecycle import make_resident
from load import Load, Pace, Run
from loraplex_client import AsyncClient
from outcome import Asking
from popularity import Popularity
from scenario import Scene, scene
from shares import service
from workload import Prefix, Traffic

DESCRIPTION = """\
First the capacity is measured: as many requests at a time as the server runs, over eight adapters.
Then seven adapters ask at random moments (Poisson), together for 60% of it; then they do so again,
at the same moments, while the eighth asks for ten times its fair share, an eighth of the capacity.
At last all eight have more requests waiting than get a place: with the same load each, with
different lengths, with different numbers of clients.
"""

EPILOG = """\
Latencies count from the moment at which a request is due, not from when the client came to send it.
What the server refuses is counted and not sent again. Service is a prompt's tokens plus twice the
generated ones.

examples:
  python benchmarks/fairness.py --save fairness
  python benchmarks/fairness.py --quick                  # whether it works; its figures say little
"""

UTILISATION = 0.6
FLOOD = 10
"""Times its fair share."""

NUM_ADAPTERS = 8
PROMPT, OUTPUT = Fixed(32), Uniform(8, 24)
RAMP_SECONDS = 3
SECONDS_TO_IDLE = 30.0
MANY = 3000
"""Requests of an adapter: more than are served before the cut."""

QUICK = {"requests": 20, "seconds": 5}


class Mix(NamedTuple):
    """What each adapter asks for when all of them have more than they get."""

    name: str
    prompts: Sequence[Lengths]  # an adapter each, as are the others
    outputs: Sequence[Lengths]
    clients: Sequence[int]


MIXES = (
    Mix("all alike", [PROMPT] * 8, [OUTPUT] * 8, [8] * 8),
    Mix(
        "different lengths",
        [*map(Fixed, (16, 16, 32, 32, 64, 64, 128, 128))],
        [*map(Fixed, (8, 32, 8, 32, 16, 48, 8, 64))],
        [16] * 8,
    ),
    Mix("different crowds", [PROMPT] * 8, [OUTPUT] * 8, [8, 8, 8, 8, 16, 16, 32, 64]),
)


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("fairness.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--requests", MIN_REQUESTS, "of each of the seven, without the flood and with it")
    number(group, "--seconds", 20, "for which the capacity is measured, and each mix")
    number(group, "--max-running", 64, "requests that the server runs together")
    group.add_argument(
        "--quick", action="store_true", help="20 requests, 5 seconds; nothing is judged"
    )
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    if args.quick:
        vars(args).update(QUICK)
    kv_tokens = 2 * args.max_running * 256
    with scene(args, NUM_ADAPTERS, kv_tokens=kv_tokens, max_running=args.max_running) as at:
        found = findings(asyncio.run(_Session(args, at).run()), args.max_running)
    return replace(found, checks=()) if args.quick else found


class _Session:
    """The phases, one after another. Mutable: `_runs`, all that were measured."""

    def __init__(self, args: argparse.Namespace, at: Scene) -> None:
        self._args = args
        self._server = at.server
        self._names = at.adapters
        self._vocab_size = 0
        self._runs: list[Run] = []

    async def run(self) -> Measured:
        async with AsyncClient(self._server.target) as client:
            self._vocab_size = (await client.server_info()).vocab_size
            await make_resident(client, self._names)
            capacity = await self._capacity(client)
            requests = capacity / ((OUTPUT.low + OUTPUT.high) / 2)
            rate = UTILISATION * requests / (NUM_ADAPTERS - 1)
            window = self._args.requests / rate
            progress(f"capacity {capacity:.0f} tokens/s; seven steady for {window:.0f} s")
            steady = await self._run(self._seven(client, rate, "steady"))
            progress("the same and a flood")
            flooded = await self._flooded(client, rate, requests / NUM_ADAPTERS * FLOOD, window)
            backlogs = {mix.name: await self._backlogged(client, mix) for mix in MIXES}
        cpu_share = max(run.cpu_share for run in self._runs)
        lag = max(percentile(run.lags, 99) for run in self._runs)
        return Measured(capacity, window, steady, flooded, backlogs, cpu_share, lag)

    async def _capacity(self, client: AsyncClient) -> float:
        traffic = self._traffic(self._names, MANY, math.inf, 0)
        run = await self._run(self._closed(client, traffic, "capacity", self._args.max_running))
        begin, end = self._counted(run)
        return sum(each.tokens_between(begin, end) for each in run.outcomes) / (end - begin)

    async def _flooded(
        self, client: AsyncClient, rate: float, flood_rate: float, window: float
    ) -> Flooded:
        # It goes on while the last of the seven are answered.
        traffic = self._traffic(self._names[:1], math.ceil(2 * window * flood_rate), flood_rate, 0)
        flood = Load(client, traffic.requests("flood"), Pace(is_open=True), Asking())
        running = asyncio.create_task(flood.run(_quiet))
        try:
            seven = await self._run(self._seven(client, rate, "flooded"), rest=False)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
        await self._rest()
        return Flooded(seven, flood.result())

    async def _backlogged(self, client: AsyncClient, mix: Mix) -> Backlog:
        progress(f"all eight waiting, {mix.name}")
        loads = []
        for index, name in enumerate(self._names):
            traffic = self._traffic([name], MANY, math.inf, index)
            traffic = replace(traffic, prompt=mix.prompts[index], output=mix.outputs[index])
            loads.append(self._closed(client, traffic, mix.name, mix.clients[index]))
        runs = await asyncio.gather(*(self._run(load, rest=False) for load in loads))
        await self._rest()
        begin, end = self._counted(runs[0])
        services, tokens = {}, {}
        for name, run in zip(self._names, runs, strict=True):
            services[name] = sum(service(each, begin, end) for each in run.outcomes)
            tokens[name] = sum(each.tokens_between(begin, end) for each in run.outcomes)
        return Backlog(services, tokens)

    def _seven(self, client: AsyncClient, rate: float, part: str) -> Load:
        """Each at moments of its own; the same ones in every part."""
        asked = [
            request
            for index, name in enumerate(self._names[1:], 1)
            for request in self._traffic([name], self._args.requests, rate, index).requests(part)
        ]
        asked.sort(key=lambda request: request.at)
        return Load(client, asked, Pace(is_open=True), Asking())

    def _closed(self, client: AsyncClient, traffic: Traffic, part: str, clients: int) -> Load:
        pace = Pace(False, clients, cut_after=RAMP_SECONDS + self._args.seconds)
        return Load(client, traffic.requests(part), pace, Asking())

    def _counted(self, run: Run) -> tuple[float, float]:
        """What of a closed loop counts."""
        if len(run.outcomes) == run.num_requests:
            raise BenchmarkError(f"{MANY} requests of an adapter did not last for the time")
        begin = run.start + RAMP_SECONDS
        return begin, begin + self._args.seconds

    def _traffic(self, names: Sequence[str], count: int, rate: float, index: int) -> Traffic:
        return Traffic(
            num_requests=count,
            adapters=names,
            popularity=Popularity("round-robin"),
            prompt=PROMPT,
            output=OUTPUT,
            prefix=Prefix(),
            rate=rate,
            burstiness=1.0,
            vocab_size=self._vocab_size,
            seed=self._args.seed * 100 + index,
        )

    async def _run(self, load: Load, rest: bool = True) -> Run:
        await load.run(_quiet)
        run = load.result()
        self._runs.append(run)
        if rest:
            await self._rest()
        return run

    async def _rest(self) -> None:
        """Until the server has left what was cut off."""
        end = time.monotonic() + SECONDS_TO_IDLE
        while time.monotonic() < end:
            counters = await asyncio.to_thread(self._server.counters)
            if not counters.value("requests_running") + counters.value("requests_waiting"):
                return
            await asyncio.sleep(0.1)
        raise BenchmarkError(f"requests that were left ran on for {SECONDS_TO_IDLE:g} s")


def _quiet(done: int, total: int) -> None:
    """No bar: the phases are announced."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
