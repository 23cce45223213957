"""Do thousands of registered adapters cost those anything that are asked for?

python benchmarks/many_adapters.py --help
"""

import argparse
import asyncio
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_files import linears_of, write_adapter
from closed_loop import Clients, Load, Prompts, stop, tokens_within
from command import Check, Findings, build_parser, number, progress, run_command, table
from lifecycle import (
    Server,
    ServerSettings,
    make_resident,
    model_folder,
    running_server,
    upload_all,
)
from loraplex.adapters.store import AdapterStore
from loraplex_client import AsyncClient
from popularity import zipf_weights
from workload import Request

DESCRIPTION = """\
Two servers, one with 2,000 adapters registered (ranks 4 to 16 on q and v), one with 5. In turn:
the same load over the same 5 adapters on both; and on the larger one a load that is Zipf
distributed over all 2,000, beside one over 32 resident adapters with the same number of different
ones in every step. Then the calls that list adapters, and the start-up with them in the store.
"""

EPILOG = """\
Generating and uploading 2,000 adapters takes a minute or two, and 6 GB of disk in the temporary
folder (TMPDIR). Each load runs for some seconds in every round, the first of which do not count.

examples:
  python benchmarks/many_adapters.py --save many_adapters
  python benchmarks/many_adapters.py --adapters 100 --rounds 1       # a quick look
"""

LIMIT_REGISTERED = 0.97
"""Throughput with thousands registered, over that with 5, on the same 5 adapters."""

LIMIT_ZIPF = 0.95
"""Throughput over all of them, over that of 32 with the same number of different ones a step."""

LIMIT_START = 5.0
"""Seconds to the ready line with all of them in the store."""

MODULES = ("q_proj", "v_proj")
RANKS = range(4, 17)
STARTS = 3
RAMP_SECONDS = 3.0

FEW, MANY = "few registered", "many registered"


class Draws:
    """A `Load` without end: adapters by weight, outputs of mixed length. Mutable: `_rng`."""

    def __init__(
        self, adapters: Sequence[str], weights: Sequence[float], prompts: Prompts, seed: int
    ) -> None:
        self._adapters = adapters
        self._weights = weights
        self._prompts = prompts
        self._rng = random.Random(f"mixed {seed}")

    def next(self, client: int) -> Request:
        (adapter,) = self._rng.choices(self._adapters, self._weights)
        return Request(self._prompts.next(), adapter, self._rng.randint(32, 96))

    def done(self, request: Request) -> None:
        pass


class Aliased:
    """Another load, with a few adapters in the place of its many: two requests that run together
    have the same adapter here exactly where they have it there.

    Mutable: `_names`, the adapter that stands for each that is in use, `_uses`, and `_free`.
    """

    def __init__(self, load: Draws, adapters: Sequence[str]) -> None:
        self._load = load
        self._free = list(adapters)
        self._names: dict[str, str] = {}
        self._uses = Counter[str]()

    def next(self, client: int) -> Request:
        request = self._load.next(client)
        assert request.adapter is not None
        if request.adapter not in self._names:
            # The one that was free for longest: each has its turn, and all stay resident.
            self._names[request.adapter] = self._free.pop(0)
        self._uses[request.adapter] += 1
        return request._replace(adapter=self._names[request.adapter])

    def done(self, request: Request) -> None:
        original = next(name for name, alias in self._names.items() if alias == request.adapter)
        self._uses[original] -= 1
        if not self._uses[original]:
            self._free.append(self._names.pop(original))


@dataclass(frozen=True, slots=True)
class Run:
    """One load for some seconds."""

    tokens_per_second: float
    distinct: float  # adapters a step, on average
    hit_rate: float  # the part of the requests for which nothing had to be loaded


@dataclass(frozen=True, slots=True)
class Kind:
    """A load on a server."""

    name: str
    server: str
    resident: Sequence[str]  # asked for once before it begins
    load: Callable[[Prompts, int], Load]


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("many_adapters.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--adapters", 2000, "registered")
    number(group, "--few", 5, "of them, which the other server has alone")
    number(group, "--clients", 32, "at once, each with one request")
    number(group, "--prompt-tokens", 64, "in each prompt")
    number(group, "--rounds", 6, "of each load")
    number(group, "--seconds", 6, "that count, of each load in a round")
    number(group, "--max-slots", 256, "resident adapters at most")
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    settings = ServerSettings(str(model), args.dtype, args.threads, max_slots=args.max_slots)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        stores = {which: work / which.replace(" ", "-") for which in (FEW, MANY)}
        with ExitStack() as stack:
            servers = {
                which: stack.enter_context(
                    running_server(settings, store, store.with_suffix(".log"))
                )
                for which, store in stores.items()
            }
            adapters = _register(args, model, work / "adapters", servers)
            kinds = _kinds(args, adapters)
            runs = asyncio.run(_measure(args, servers, kinds))
            pages = asyncio.run(_list_all(servers[MANY], len(adapters)))
        starts = {which: _starts(settings, store) for which, store in stores.items()}
        opening = _opening(stores[MANY])
    return _findings(runs, pages, starts, opening, len(adapters))


def _register(
    args: argparse.Namespace, model: Path, folder: Path, servers: Mapping[str, Server]
) -> list[str]:
    """All to one server, a few to the other; a hundred at a time, so that they take no room."""
    linears = [linear for linear in linears_of(model) if linear.module in MODULES]
    rng = random.Random(args.seed)
    names = [f"many-{index:05}" for index in range(args.adapters)]
    for first in range(0, len(names), 100):
        paths = {name: folder / name for name in names[first : first + 100]}
        for path in paths.values():
            write_adapter(path, linears, rng.choice(RANKS), seed=rng.getrandbits(32))
        upload_all(servers[MANY].target, paths)
        if first == 0:
            few = {name: paths[name] for name in names[: args.few]}
            upload_all(servers[FEW].target, few)
        shutil.rmtree(folder)
        progress(f"{first + len(paths)} adapters uploaded")
    return names


def _kinds(args: argparse.Namespace, adapters: Sequence[str]) -> list[Kind]:
    few, all_alike = adapters[: args.few], [1.0] * args.few
    zipf = zipf_weights(len(adapters), 1.0)
    resident = adapters[: args.clients]

    def over_few(prompts: Prompts, seed: int) -> Load:
        return Draws(few, all_alike, prompts, seed)

    def over_all(prompts: Prompts, seed: int) -> Draws:
        return Draws(adapters, zipf, prompts, seed)

    def aliased(prompts: Prompts, seed: int) -> Load:
        return Aliased(over_all(prompts, seed), resident)

    return [
        Kind(f"{args.few} adapters, {args.few} registered", FEW, few, over_few),
        Kind(f"{args.few} adapters, {len(adapters)} registered", MANY, few, over_few),
        Kind(f"{len(resident)} adapters, as many different ones a step", MANY, resident, aliased),
        Kind(f"Zipf 1.0 over {len(adapters)}", MANY, (), over_all),
    ]


async def _measure(
    args: argparse.Namespace, servers: Mapping[str, Server], kinds: Sequence[Kind]
) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {kind.name: [] for kind in kinds}
    for round_ in range(args.rounds):
        # Every other round backwards, so that a drift does not favour the same ones.
        for kind in kinds if round_ % 2 == 0 else reversed(kinds):
            run = await _run(args, servers[kind.server], kind, args.seed * 100 + round_)
            runs[kind.name].append(run)
            progress(f"round {round_ + 1}: {kind.name}: {run.tokens_per_second:.0f} tokens/s")
    return runs


async def _run(args: argparse.Namespace, server: Server, kind: Kind, seed: int) -> Run:
    async with AsyncClient(server.target) as client:
        info = await client.server_info()
        await make_resident(client, kind.resident)
        load = kind.load(Prompts(info.vocab_size, args.prompt_tokens, seed), seed)
        clients = Clients(client, args.clients)
        running = asyncio.create_task(clients.run(load))
        await asyncio.wait([running], timeout=RAMP_SECONDS)
        before, begin = await asyncio.to_thread(server.counters), time.monotonic()
        await asyncio.wait([running], timeout=args.seconds)
        after, end = await asyncio.to_thread(server.counters), time.monotonic()
        await stop(running)
    num_sent = sum(1 for outcome in clients.outcomes if begin <= outcome.due < end)
    num_loads = after.since(before, "adapter_loads_total", result="ok")
    return Run(
        tokens_within(clients.outcomes, begin, end) / (end - begin),
        after.mean_since(before, "batch_distinct_adapters") or 0.0,
        1 - num_loads / num_sent if num_sent else 1.0,
    )


async def _list_all(server: Server, expected: int) -> dict[int, tuple[float, float]]:
    """(seconds in all, seconds a page) by page size."""
    times = {}
    async with AsyncClient(server.target) as client:
        for page_size in (50, 1000):
            begin = time.monotonic()
            count = len([adapter async for adapter in client.list_adapters(page_size=page_size)])
            seconds = time.monotonic() - begin
            assert count == expected, f"{count} of {expected} adapters are listed"
            times[page_size] = (seconds, seconds / -(-count // page_size))
    return times


def _starts(settings: ServerSettings, store: Path) -> list[float]:
    """Seconds from starting the process to its ready line."""

    def each() -> Iterator[float]:
        for _ in range(STARTS):
            with running_server(settings, store, store.with_suffix(".start.log")) as server:
                yield server.seconds_to_ready

    return list(each())


def _opening(root: Path) -> float:
    """Seconds that the store takes of that; best of several, in this process."""

    def once() -> float:
        begin = time.monotonic()
        store = AdapterStore.open(root, "0" * 64, 1 << 40)
        seconds = time.monotonic() - begin
        store.close()
        return seconds

    return min(once() for _ in range(STARTS))


def _findings(
    runs: Mapping[str, Sequence[Run]],
    pages: Mapping[int, tuple[float, float]],
    starts: Mapping[str, Sequence[float]],
    opening: float,
    num_adapters: int,
) -> Findings:
    few, many, aliased, zipf = runs
    start = statistics.median(starts[MANY])
    checks = [
        Check(
            "registered: throughput of many over few",
            _ratio(runs, many, few),
            LIMIT_REGISTERED,
            False,
        ),
        Check("Zipf: throughput over that of 32", _ratio(runs, zipf, aliased), LIMIT_ZIPF, False),
        Check(f"start-up with {num_adapters} in the store, seconds", start, LIMIT_START),
    ]
    rows = [
        [
            name,
            f"{_median(each):.1f}",
            f"{statistics.mean(run.distinct for run in each):.1f}",
            f"{statistics.mean(run.hit_rate for run in each):.0%}",
            f"{_ratio(runs, name, few):.3f}",
        ]
        for name, each in runs.items()
    ]
    header = ["load", "tokens/s", "different adapters a step", "hit rate", "of the first"]
    lines = [
        f"Start-up with {num_adapters} in the store {start:.2f} s, with a few "
        f"{statistics.median(starts[FEW]):.2f} s; opening the store takes {opening:.2f} s of it.",
        *(
            f"Listing all in pages of {size}: {seconds:.2f} s, {1000 * each:.1f} ms a page."
            for size, (seconds, each) in pages.items()
        ),
    ]
    figures: dict[str, Any] = {
        "runs": {
            name: [
                {
                    "tokens_per_second": r.tokens_per_second,
                    "distinct": r.distinct,
                    "hits": r.hit_rate,
                }
                for r in each
            ]
            for name, each in runs.items()
        },
        "zipf_of_few": _ratio(runs, zipf, few),
        "start_seconds": starts,
        "store_open_seconds": opening,
        "list_seconds": {size: seconds for size, (seconds, _) in pages.items()},
    }
    return Findings(f"{table(header, rows)}\n\n" + "\n".join(lines), figures, checks)


def _median(runs: Sequence[Run]) -> float:
    return statistics.median(run.tokens_per_second for run in runs)


def _ratio(runs: Mapping[str, Sequence[Run]], name: str, base: str) -> float:
    """Median of the rounds' ratios: neighbours in time are compared."""
    pairs = zip(runs[name], runs[base], strict=True)
    return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
