"""Do running streams stall while an adapter is uploaded, published and brought to the device?

python benchmarks/stall.py --help
"""

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapter_files import linears_of, weights_bytes, write_adapter, write_variant
from child import Child
from closed_loop import Clients, Prompts, pauses_within, stop
from command import Check, Findings, build_parser, number, progress, run_command, table
from figures import percentile
from lifecycle import Server, ServerSettings, model_folder, running_server, upload_all
from loraplex_client import AsyncClient
from outcome import Outcome
from scenario import until
from uploader import Moments
from workload import Request

DESCRIPTION = """\
Streams run on resident adapters; meanwhile adapters of about 40 MB come, one after another, each
sent, published and brought to the device. In between there are windows of the same length without
an upload. Compared are the pauses between tokens of the running streams, as their client sees
them: all that reach into a window from an upload's first byte to its adapter being resident,
and all that reach into a quiet one.
"""

EPILOG = """\
The streams are long, so that prompts are rare: a pause over a prompt would hide one over an upload.
Server, streams' client and uploader are processes of their own and share this machine's cores.

examples:
  python benchmarks/stall.py --save stall
  python benchmarks/stall.py --uploads 3 --pauses 100       # a quick look
"""

LIMIT = 2.0
"""The 99th percentile of the pauses during uploads, over that of those without."""

MAX_UPLOADS = 60
SECONDS_TO_SETTLE = 1.0
FIRST_QUIET_SECONDS = 1.5
P99 = "p99_ms"
QUANTILES = {"p50_ms": 50, P99: 99, "max_ms": 100}
PHASES = ("sending", "publishing", "loading")

Window = tuple[float, float]


@dataclass(slots=True)
class Windows:
    """When what happened, on `time.monotonic`."""

    uploads: list[Moments] = field(default_factory=list)
    quiet: list[Window] = field(default_factory=list)

    def busy(self) -> list[Window]:
        return [(upload.first_byte, upload.resident) for upload in self.uploads]

    def phase(self, name: str) -> list[Window]:
        """A part of every upload's window."""
        first = PHASES.index(name)
        return [(upload[first], upload[first + 1]) for upload in self.uploads]


class LongStreams:
    """A `Load` without end: many tokens a stream, on the resident adapters.

    Mutable: `_begun`. A client's first stream is cut short, each by another part, so that no two
    end together.
    """

    def __init__(
        self, adapters: Sequence[str], prompts: Prompts, max_tokens: int, num_clients: int
    ) -> None:
        self._adapters = adapters
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._num_clients = num_clients
        self._begun: set[int] = set()

    def next(self, client: int) -> Request:
        tokens = self._max_tokens
        if client not in self._begun:
            self._begun.add(client)
            tokens = max(2, tokens * (client + 1) // self._num_clients)
        return Request(self._prompts.next(), self._adapters[client % len(self._adapters)], tokens)

    def done(self, request: Request) -> None:
        pass


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("stall.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--streams", 8, "that run at once")
    number(group, "--stream-tokens", 2048, "out of each")
    number(group, "--adapters", 4, "resident ones, of rank 16, that the streams run on")
    number(group, "--upload-rank", 64, "of the uploaded adapters, on all seven linears")
    number(group, "--uploads", 10, "at least so many")
    number(group, "--pauses", 2000, "go on until so many pauses of each kind are pooled")
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    linears = linears_of(model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        resident = {f"runs-{index}": work / f"runs-{index}" for index in range(args.adapters)}
        for index, folder in enumerate(resident.values()):
            write_adapter(folder, linears, 16, seed=args.seed * 1000 + index)
        write_adapter(work / "comes", linears, args.upload_rank, seed=args.seed)
        settings = ServerSettings(str(model), args.dtype, args.threads)
        with running_server(settings, work / "store", work / "server.log") as server:
            upload_all(server.target, resident)
            with Child("the uploader", ["uploader", server.target], work / "uploader.log") as child:
                session = _Session(args, server, child, work / "comes")
                asyncio.run(session.run(list(resident)))
    return _findings(session)


class _Session:
    """Streams, and beside them quiet windows and uploads in turn. Mutable: what was measured."""

    def __init__(
        self, args: argparse.Namespace, server: Server, uploader: Child, adapter: Path
    ) -> None:
        self._args = args
        self._server = server
        self._uploader = uploader
        self._adapter = adapter
        self.windows = Windows()
        self.outcomes: list[Outcome] = []
        self.num_bytes = weights_bytes(adapter)

    async def run(self, adapters: Sequence[str]) -> None:
        args = self._args
        async with AsyncClient(self._server.target) as client:
            info = await client.server_info()
            prompts = Prompts(info.vocab_size, 64, args.seed)
            clients = Clients(client, args.streams)
            self.outcomes = clients.outcomes
            load = LongStreams(adapters, prompts, args.stream_tokens, args.streams)
            streams = asyncio.create_task(clients.run(load))
            await until(lambda: _num_decoding(self.outcomes) == args.streams, streams)
            turns = asyncio.create_task(self._take_turns("pin" in info.features))
            await asyncio.wait([streams, turns], return_when=asyncio.FIRST_COMPLETED)
            await stop(streams)
            await turns

    async def _take_turns(self, pin: bool) -> None:
        length = FIRST_QUIET_SECONDS
        while not self._is_enough():
            index = len(self.windows.uploads)
            folder = self._adapter.with_name(f"comes-{index}")
            await asyncio.to_thread(write_variant, folder, self._adapter, index)
            await asyncio.sleep(SECONDS_TO_SETTLE)
            begin = time.monotonic()
            await asyncio.sleep(length)
            self.windows.quiet.append((begin, time.monotonic()))
            order = {"name": folder.name, "folder": str(folder), "pin": pin}
            moments = Moments(**await self._order(order))
            self.windows.uploads.append(moments)
            length = moments.resident - moments.first_byte
            await self._order({"delete": folder.name})
            await asyncio.to_thread(shutil.rmtree, folder)
            progress(f"upload {index + 1}: {length:.2f} s until resident")

    async def _order(self, order: dict[str, object]) -> dict[str, float]:
        self._uploader.write(json.dumps(order))
        reply: dict[str, float] = json.loads(await asyncio.to_thread(self._uploader.read))
        return reply

    def _is_enough(self) -> bool:
        windows, args = self.windows, self._args
        if len(windows.uploads) < args.uploads:
            return False
        if len(windows.uploads) >= MAX_UPLOADS:
            return True
        pooled = (pauses_within(self.outcomes, each) for each in (windows.busy(), windows.quiet))
        return all(len(pauses) >= args.pauses for pauses in pooled)


def _num_decoding(outcomes: Sequence[Outcome]) -> int:
    return sum(1 for each in outcomes if len(each.arrivals) > 1 and each.timings is None)


def _findings(session: _Session) -> Findings:
    windows = session.windows
    spans = {
        "quiet": windows.quiet,
        "upload": windows.busy(),
        **{f"- {name}": windows.phase(name) for name in PHASES},
    }
    figures = {name: _figures(session.outcomes, each) for name, each in spans.items()}
    quiet, busy = figures["quiet"], figures["upload"]
    checks = [
        Check("p99 of the pauses during uploads over p99 without", busy[P99] / quiet[P99], LIMIT),
        Check("uploads", len(windows.uploads), 10, at_most=False),
        Check("pauses pooled", min(busy["pauses"], quiet["pauses"]), 2000, at_most=False),
    ]
    rows = [
        [
            name,
            f"{each['pauses']}",
            f"{each['seconds']:.1f}",
            *(f"{each[q]:.0f}" for q in QUANTILES),
        ]
        for name, each in figures.items()
    ]
    header = ["window", "pauses", "seconds", "p50 ms", "p99 ms", "longest ms"]
    size = session.num_bytes
    text = f"{table(header, rows)}\n\n{len(windows.uploads)} uploads of {size / 1e6:.1f} MB."
    record = {name.strip("- "): each for name, each in figures.items()}
    return Findings(text, {**record, "upload_bytes": size}, checks)


def _figures(outcomes: Sequence[Outcome], spans: Sequence[Window]) -> dict[str, float]:
    pauses = pauses_within(outcomes, spans)
    return {
        "pauses": len(pauses),
        "seconds": sum(end - begin for begin, end in spans),
        **{q: 1000 * percentile(pauses, p) if pauses else 0.0 for q, p in QUANTILES.items()},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
