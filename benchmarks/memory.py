"""What does a server hold in memory, with its arena full of adapters and KV?

python benchmarks/memory.py --help
"""

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_files import linears_of, write_adapter
from child import BenchmarkError, Child
from closed_loop import Clients, Prompts
from command import Check, Findings, build_parser, number, progress, run_command, table
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
from loraplex.config import format_size, parse_size
from loraplex.model.config import read_model_config
from loraplex_client import AsyncClient
from process_memory import ProcessMemory, maps, memory_of
from scenario import RANK, Once
from workload import Request

DESCRIPTION = """\
A server with a small arena gets eight adapters, brings all of them to its device and answers
batches of 32 requests over all of them. Its memory is read from /proc when it is ready, after the
uploads, and all the time while it answers; beside it, a process that only imports what the server
imports.
"""

EPILOG = """\
MB and GB are powers of ten. RSS counts every page of the process that is in memory, whoever shares
it; PSS counts a page that n processes share as 1/n.

examples:
  python benchmarks/memory.py --save memory
  python benchmarks/memory.py --waves 1 --memory 1G
"""

LIMIT = 1.0
"""GB of RSS at most, while it answers."""

LAYERS = {
    "loraplex.cli": "gRPC and the command",
    "torch": "torch",
    "loraplex.serve": "what else the server imports",
    "bitsandbytes": "bitsandbytes",
}
"""Imported one after another, and what each brings."""

SECONDS_BETWEEN_READINGS = 0.1
NF4_BLOCK = 64
WEIGHT_FORM = re.compile(r"serving from (.*)")


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("memory.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--memory",
        type=_size,
        default=parse_size("256M"),
        metavar="SIZE",
        help="for KV and adapters together (default: 256M)",
    )
    number(group, "--adapters", 8, "of rank 16 on all linears")
    number(group, "--batch", 32, "requests at once")
    number(group, "--prompt-tokens", 64, "in each prompt")
    number(group, "--max-tokens", 64, "out of each request")
    number(group, "--waves", 3, "of requests")
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    linears = linears_of(model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        folders = {f"load-{index:02}": work / f"load-{index:02}" for index in range(args.adapters)}
        for index, folder in enumerate(folders.values()):
            write_adapter(folder, linears, RANK, seed=args.seed * 1000 + index)
        progress("importing what a server imports")
        imports = _imports(work / "imports.log")
        progress("starting a server, uploading")
        settings = ServerSettings(str(model), args.dtype, args.threads, memory=args.memory)
        log = work / "server.log"
        with running_server(settings, work / "store", log) as server:
            moments = {"ready": memory_of(server.pid)}
            upload_all(server.target, folders)
            moments["all adapters uploaded"] = memory_of(server.pid)
            arena = asyncio.run(_serve(args, server, list(folders), moments))
            has_bitsandbytes = maps(server.pid, "bitsandbytes")
        said = WEIGHT_FORM.search(log.read_text(errors="replace"))
    record = {
        "imports": {what: asdict(each) for what, each in imports.items()},
        "server": {what: asdict(each) for what, each in moments.items()},
        "weights": weights_of(model, args.dtype),
        "arena": arena,
        "bitsandbytes_in_server": has_bitsandbytes,
        "weight_form": said[1] if said is not None else None,
    }
    return _findings(args, imports, moments, record)


def _imports(log: Path) -> dict[str, ProcessMemory]:
    """After each import, by what it brought."""
    with Child("the importer", ["process_memory", *LAYERS], log) as child:
        return {
            what: ProcessMemory(**json.loads(child.read()))
            for what in ("Python alone", *(f"+ {brings}" for brings in LAYERS.values()))
        }


async def _serve(
    args: argparse.Namespace,
    server: Server,
    adapters: Sequence[str],
    moments: dict[str, ProcessMemory],
) -> dict[str, float]:
    """Fills in `moments`; bytes of the arena by use, and the adapters on the device."""
    async with AsyncClient(server.target) as client:
        vocab_size = (await client.server_info()).vocab_size
        await make_resident(client, adapters)
        moments["all adapters on the device"] = memory_of(server.pid)
        prompts = Prompts(vocab_size, args.prompt_tokens, args.seed)
        most = moments["all adapters on the device"]
        kv_blocks = 0.0
        for wave in range(args.waves):
            requests = [
                Request(prompts.next(), adapters[index % len(adapters)], args.max_tokens)
                for index in range(args.batch)
            ]
            running = asyncio.create_task(Clients(client, args.batch).run(Once(requests)))
            while not running.done():
                most = max(most, memory_of(server.pid), key=lambda each: each.resident)
                counters = await asyncio.to_thread(server.counters)
                blocks = (counters.value("memory_blocks", use=use) for use in ("kv", "cached"))
                kv_blocks = max(kv_blocks, sum(blocks))
                await asyncio.wait([running], timeout=SECONDS_BETWEEN_READINGS)
            running.result()
            progress(f"wave {wave + 1}: RSS {_megabytes(most.resident)} MB at most")
        moments[f"answering {args.batch} at once, the most"] = most
        moments["afterwards"] = memory_of(server.pid)
        size = await block_bytes(server, client)
    counters = server.counters()
    return {
        "kv_most": kv_blocks * size,
        "adapters": counters.value("memory_blocks", use="adapter") * size,
        "adapters_on_device": counters.value("adapters_resident", tier="device"),
    }


def weights_of(model: Path, dtype: str) -> dict[str, int]:
    """Bytes of the parts of the base model, the norms' left out."""
    config = read_model_config(model)
    linear = sum(each.out_features * each.in_features for each in config.linears())
    tables = 1 if config.tie_word_embeddings else 2
    return {
        "codes": linear // 2,
        "absmax": 4 * linear // NF4_BLOCK,
        "embedding_and_head": tables * config.vocab_size * config.hidden_size * itemsize(dtype),
        "dense_copy": linear * itemsize(dtype),
    }


def _findings(
    args: argparse.Namespace,
    imports: Mapping[str, ProcessMemory],
    moments: Mapping[str, ProcessMemory],
    record: Mapping[str, Any],
) -> Findings:
    rows = [
        [title, *(_megabytes(size) for size in asdict(each).values())]
        for title, each in (
            *((f"importing: {what}", each) for what, each in imports.items()),
            *((f"server: {what}", each) for what, each in moments.items()),
        )
    ]
    header = ["MB", "RSS", "PSS", "PSS of no file", "PSS of files", "RSS at its peak"]
    most = max(each.resident for each in moments.values())
    weights, arena = record["weights"], record["arena"]
    if not arena["kv_most"]:
        raise BenchmarkError("the requests were answered before the memory was read: more of them")
    text = (
        f"{table(header, rows)}\n\n"
        f"The server says: serving from {record['weight_form'] or 'nothing about the weights'}. "
        f"bitsandbytes is {'' if record['bitsandbytes_in_server'] else 'not '}loaded in it.\n"
        f"What must be there: codes {_megabytes(weights['codes'])}, their absmax "
        f"{_megabytes(weights['absmax'])}, embedding and head "
        f"{_megabytes(weights['embedding_and_head'])} (a dense copy of the codes would be "
        f"{_megabytes(weights['dense_copy'])}); of the arena's {_megabytes(args.memory)} "
        f"({format_size(args.memory)}) adapters took {_megabytes(arena['adapters'])}, KV "
        f"with cached prefixes {_megabytes(arena['kv_most'])} at most."
    )
    checks = [
        Check("RSS of the server from ready on, the most, GB", most / 1e9, LIMIT),
        Check(
            "adapters on the device",
            arena["adapters_on_device"],
            args.adapters,
            at_most=False,
        ),
    ]
    return Findings(text, record, checks)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
