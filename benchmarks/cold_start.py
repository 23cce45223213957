"""What does a request wait when its adapter is not resident? More adapters than memory, beside
memory for all of them.

python benchmarks/cold_start.py --help
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_files import linears_of, weights_bytes, write_adapter
from closed_loop import Clients, Prompts
from command import Check, Findings, build_parser, number, progress, run_command, table
from figures import percentile
from lifecycle import (
    Server,
    ServerSettings,
    block_bytes,
    kv_token_bytes,
    make_resident,
    model_folder,
    running_server,
    upload_all,
)
from loraplex.config import format_size
from loraplex_client import AsyncClient
from measures import is_cold
from outcome import Outcome
from popularity import draws
from workload import Request

DESCRIPTION = """\
The same requests go to two servers in turn. One has memory for all adapters, and all of them are
resident. The other's --memory is the KV of the clients' running requests plus 8 adapters. Compared
are times to first token: of all requests, and of those that had to wait for their adapter.
"""

EPILOG = """\
Each client sends its next request when the last one is answered; its first one in a round is of
random length, so that they do not march in step, and is not counted.

examples:
  python benchmarks/cold_start.py --save cold_start
  python benchmarks/cold_start.py --rounds 1 --requests 16        # a quick look
"""

LIMIT_ALL = 1.5
"""p50 TTFT of all requests, over that of the all-resident server in the same run."""

LIMIT_LOADED = 3.0
"""p50 TTFT of the requests that had to load, over the same."""

COMPETITOR = "SGLang, 16 adapters in 8 slots: 40 ms -> 6,278 ms, 157x (sglang#13349)"

RESIDENT, SCARCE = "all resident", "memory for 8"


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often which adapters are asked for."""

    name: str
    num_adapters: int
    exponent: float  # Zipf's; 0: all the same


@dataclass(slots=True)
class Tally:
    """One server's measurements under one popularity."""

    outcomes: list[Outcome] = field(default_factory=list)  # those that count
    num_loads: float = 0.0
    num_requests: int = 0  # with those that do not count

    @property
    def waited(self) -> list[Outcome]:
        """Their adapter was not resident when they came."""
        return [outcome for outcome in self.outcomes if is_cold(outcome)]

    def first_tokens(self) -> list[float]:
        return [outcome.first_token for outcome in self.outcomes]


class Round:
    """A `Load`: one request of random length for each client, which does not count, then a queue
    that all of them draw from. Mutable: `_left`, `_begun`."""

    def __init__(self, requests: Sequence[Request], seed: int) -> None:
        self._left = list(reversed(requests))
        self._begun: set[int] = set()
        self._rng = random.Random(f"round {seed}")

    def next(self, client: int) -> Request | None:
        if not self._left:
            return None
        request = self._left.pop()
        if client in self._begun:
            return request
        self._begun.add(client)
        return request._replace(max_tokens=self._rng.randint(2, request.max_tokens))

    def done(self, request: Request) -> None:
        pass


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("cold_start.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--clients", 8, "at once, each with one request")
    number(group, "--adapters", 64, "on all seven linears")
    number(group, "--uniform", 16, "of them, asked for equally often in the second part")
    number(group, "--capacity", 8, "adapters that the second server has memory for")
    number(group, "--rank", 16, "of the adapters")
    number(group, "--prompt-tokens", 64, "in each prompt")
    number(group, "--max-tokens", 64, "out of each request")
    number(group, "--requests", 40, "that count, in a round")
    number(group, "--rounds", 2, "of each server and popularity")
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        work = Path(name)
        adapters = _write(args, model, work / "adapters")
        size = sum(map(weights_bytes, adapters.values()))

        def start(which: str, memory: int) -> Server:
            settings = ServerSettings(str(model), args.dtype, args.threads, memory=memory)
            progress(f"{which}: a server with --memory {format_size(memory)}, uploading")
            folder = work / which.replace(" ", "-")
            folder.mkdir()
            server = stack.enter_context(
                running_server(settings, folder / "store", folder / "server.log")
            )
            upload_all(server.target, adapters)
            return server

        resident = start(RESIDENT, 2 * size + (256 << 20))
        memory = asyncio.run(_scarce_memory(args, model, resident, list(adapters)))
        servers = {RESIDENT: resident, SCARCE: start(SCARCE, memory)}
        popularities = (
            Popularity("Zipf 1.0", args.adapters, 1.0),
            Popularity("uniform", min(args.uniform, args.adapters), 0.0),
        )
        tallies = asyncio.run(_measure(args, servers, list(adapters), popularities))
    return _findings(tallies, memory)


def _write(args: argparse.Namespace, model: Path, folder: Path) -> dict[str, Path]:
    linears = linears_of(model)
    adapters = {f"cold-{index:03}": folder / f"{index:03}" for index in range(args.adapters)}
    for index, path in enumerate(adapters.values()):
        write_adapter(path, linears, args.rank, seed=args.seed * 1000 + index)
    return adapters


async def _scarce_memory(
    args: argparse.Namespace, model: Path, server: Server, adapters: Sequence[str]
) -> int:
    """Bytes: the KV of every client's request, and `capacity` adapters. Makes all resident here."""
    async with AsyncClient(server.target) as client:
        await make_resident(client, adapters)
        size = await block_bytes(server, client)
    blocks = server.counters().value("memory_blocks", use="adapter") / len(adapters)
    block_tokens = size // kv_token_bytes(model, args.dtype)
    kv: int = args.clients * -(-(args.prompt_tokens + args.max_tokens) // block_tokens)
    weights: int = args.capacity * round(blocks)
    return (kv + weights) * size


async def _measure(
    args: argparse.Namespace,
    servers: dict[str, Server],
    adapters: Sequence[str],
    popularities: Sequence[Popularity],
) -> dict[Popularity, dict[str, Tally]]:
    tallies = {each: {which: Tally() for which in servers} for each in popularities}
    async with AsyncClient(servers[RESIDENT].target) as client:
        vocab_size = (await client.server_info()).vocab_size
    for popularity in popularities:
        for round_ in range(args.rounds):
            seed = args.seed * 100 + round_
            requests = _requests(args, adapters, popularity, vocab_size, seed)
            # Every other round backwards, so that a drift does not favour the same one.
            for which in servers if round_ % 2 == 0 else reversed(servers):
                progress(f"{popularity.name}, round {round_ + 1}: {which}")
                tally = tallies[popularity][which]
                await _round(servers[which], requests, args.clients, seed, tally)
    return tallies


def _requests(
    args: argparse.Namespace,
    adapters: Sequence[str],
    popularity: Popularity,
    vocab_size: int,
    seed: int,
) -> list[Request]:
    prompts = Prompts(vocab_size, args.prompt_tokens, seed)
    count = args.clients + args.requests
    drawn = draws(popularity.num_adapters, popularity.exponent, count, seed)
    return [Request(prompts.next(), adapters[index], args.max_tokens) for index in drawn]


async def _round(
    server: Server, requests: Sequence[Request], num_clients: int, seed: int, tally: Tally
) -> None:
    before = server.counters()
    async with AsyncClient(server.target) as client:
        outcomes = await Clients(client, num_clients).run(Round(requests, seed))
    tally.num_loads += server.counters().since(before, "adapter_loads_total", result="ok")
    tally.num_requests += len(outcomes)
    tally.outcomes += outcomes[num_clients:]  # the first ones do not count


def _findings(tallies: Mapping[Popularity, Mapping[str, Tally]], memory: int) -> Findings:
    rows, checks, lines = [], [], []
    figures: dict[str, Any] = {"scarce_memory_bytes": memory}
    for popularity, by_server in tallies.items():
        base = percentile(by_server[RESIDENT].first_tokens(), 50)
        for which, tally in by_server.items():
            row = _figures(tally, base)
            figures[f"{popularity.name}, {which}"] = row
            name = f"{popularity.name} over {popularity.num_adapters}, {which}"
            rows.append([name, *_cells(row)])
        scarce = figures[f"{popularity.name}, {SCARCE}"]
        checks += [
            Check(f"{popularity.name}: p50 TTFT, all requests", scarce["of_resident"], LIMIT_ALL),
            Check(
                f"{popularity.name}: p50 TTFT, had to load",
                scarce["waited_of_resident"],
                LIMIT_LOADED,
            ),
        ]
        worst = scarce["p50_ms"] / (base * 1000)
        lines.append(f"{popularity.name} over {popularity.num_adapters}: {worst:.2f}x")
    header = [
        *("requests", "counted", "TTFT ms p50", "p90", "p99", "of all resident"),
        *("had to wait", "their p50", "of all resident", "hit rate", "loads a request"),
    ]
    text = (
        f"{table(header, rows)}\n\n"
        f"The scarce server has {format_size(memory)} for KV and adapters.\n"
        f"A competitor's figure, of another machine and model: {COMPETITOR}; here "
        f"{', '.join(lines)}."
    )
    return Findings(text, {**figures, "competitor": COMPETITOR}, checks)


def _figures(tally: Tally, base: float) -> dict[str, float]:
    first = tally.first_tokens()
    waited = [outcome.first_token for outcome in tally.waited]
    waited_p50 = percentile(waited, 50) if waited else 0.0
    return {
        "requests": len(first),
        **{f"p{q}_ms": 1000 * percentile(first, q) for q in (50, 90, 99)},
        "of_resident": percentile(first, 50) / base,
        "waited": len(waited),
        "waited_p50_ms": 1000 * waited_p50,
        "waited_of_resident": waited_p50 / base,
        "hit_rate": 1 - len(waited) / len(first),
        "loads_a_request": tally.num_loads / tally.num_requests,
    }


def _cells(row: Mapping[str, float]) -> list[str]:
    return [
        f"{row['requests']}",
        *(f"{row[f'p{q}_ms']:.0f}" for q in (50, 90, 99)),
        f"{row['of_resident']:.2f}",
        f"{row['waited']}",
        f"{row['waited_p50_ms']:.0f}",
        f"{row['waited_of_resident']:.2f}",
        f"{row['hit_rate']:.0%}",
        f"{row['loads_a_request']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
