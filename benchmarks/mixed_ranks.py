"""Do adapters of mixed ranks take the memory that they weigh, or that of the largest rank?

python benchmarks/mixed_ranks.py --help
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from adapter_files import linears_of, write_adapter
from command import Check, Findings, build_parser, progress, run_command, table
from lifecycle import (
    Server,
    ServerSettings,
    block_bytes,
    itemsize,
    make_resident,
    model_folder,
    running_server,
    upload_all,
)
from loraplex.config import format_size
from loraplex_client import AsyncClient

DESCRIPTION = """\
Adapters of ranks 4 to 64 on all modules are made resident together. Compared are the bytes of the
blocks that they take, as /metrics tells, with what their matrices weigh: element size times the
sum over matrices of the rank, rounded up to 16, times (inputs + outputs).
"""

EPILOG = """\
examples:
  python benchmarks/mixed_ranks.py --save mixed_ranks
"""

LIMIT = 1.05
"""Bytes of the blocks over those of the matrices."""

RANKS = range(4, 65, 4)
GRANULE_RANK = 16


def main(argv: Sequence[str]) -> int:
    parser = build_parser("mixed_ranks.py", DESCRIPTION, EPILOG)
    return run_command(parser, _benchmark, argv)


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    linears = linears_of(model)
    features = sum(linear.in_features + linear.out_features for linear in linears)
    ideal = {rank: itemsize(args.dtype) * features * rounded_up(rank) for rank in RANKS}
    memory = 2 * sum(ideal.values()) + (256 << 20)
    settings = ServerSettings(str(model), args.dtype, args.threads, memory=memory)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        adapters = {f"rank-{rank:02}": work / f"rank-{rank:02}" for rank in RANKS}
        for rank, folder in zip(RANKS, adapters.values(), strict=True):
            write_adapter(folder, linears, rank, seed=args.seed * 1000 + rank)
        progress("starting a server, uploading")
        with running_server(settings, work / "store", work / "server.log") as server:
            upload_all(server.target, adapters)
            size, blocks = asyncio.run(_blocks(server, list(adapters)))
    return _findings(ideal, dict(zip(RANKS, blocks, strict=True)), size)


def rounded_up(rank: int) -> int:
    return -(-rank // GRANULE_RANK) * GRANULE_RANK


async def _blocks(server: Server, adapters: Sequence[str]) -> tuple[int, list[int]]:
    """A block's bytes, and how many each adapter takes: they become resident one after another."""
    held = [0]
    async with AsyncClient(server.target) as client:
        for name in adapters:
            await make_resident(client, [name])
            held.append(round(server.counters().value("memory_blocks", use="adapter")))
        size = await block_bytes(server, client)
    return size, [after - before for before, after in pairwise(held)]


def _findings(ideal: Mapping[int, int], blocks: Mapping[int, int], size: int) -> Findings:
    taken = {rank: count * size for rank, count in blocks.items()}
    total, weighed = sum(taken.values()), sum(ideal.values())
    padded = len(ideal) * max(ideal.values())
    rows = [
        [
            f"rank {rank}",
            f"{blocks[rank]}",
            _megabytes(taken[rank]),
            _megabytes(ideal[rank]),
            f"{taken[rank] / ideal[rank]:.3f}",
        ]
        for rank in ideal
    ]
    rows.append(
        [
            "together",
            f"{sum(blocks.values())}",
            _megabytes(total),
            _megabytes(weighed),
            f"{total / weighed:.3f}",
        ]
    )
    text = (
        f"{table(['adapter', 'blocks', 'MB taken', 'MB of matrices', 'ratio'], rows)}\n\n"
        f"Blocks of {format_size(size)}. Padded to the largest rank, these adapters would "
        f"take {padded / total:.2f} times as much."
    )
    figures = {"block_bytes": size, "blocks": blocks, "ideal_bytes": ideal}
    what = (
        f"blocks of {len(ideal)} adapters of ranks {min(ideal)} to {max(ideal)} over their weight"
    )
    return Findings(text, figures, [Check(what, total / weighed, LIMIT)])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
