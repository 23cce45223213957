"""What the benchmarks under load share: a server with adapters, and streams until one has enough.

Shared by long_prompt.py, fairness.py, scaling.py and memory.py; the last part by stall.py, too.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapter_files import linears_of, weights_bytes, write_adapter
from child import BenchmarkError
from command import progress
from lifecycle import (
    Server,
    ServerSettings,
    kv_token_bytes,
    model_folder,
    running_server,
    upload_all,
)
from loraplex.config import format_size
from outcome import Outcome
from workload import Request

RANK = 16

_SLACK = 64 << 20
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True, slots=True)
class Scene:
    """A server that is ready and has the adapters, all of rank 16 on all linears."""

    server: Server
    adapters: tuple[str, ...]  # by name


class Once:
    """A `Load` of one request a client."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = dict(enumerate(requests))

    def next(self, client: int) -> Request | None:
        return self._requests.pop(client, None)

    def done(self, request: Request) -> None:
        pass


@contextmanager
def scene(
    args: argparse.Namespace,
    num_adapters: int,
    *,
    kv_tokens: int,
    max_running: int = 64,
) -> Iterator[Scene]:
    """Its arena holds the KV of so many tokens beside all adapters.

    Nothing is speculated: random weights repeat themselves, and drafts would be right more often
    than anywhere else.
    """
    model = model_folder(args.model)
    linears = linears_of(model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        folders = {f"load-{index:02}": work / f"load-{index:02}" for index in range(num_adapters)}
        for index, folder in enumerate(folders.values()):
            write_adapter(folder, linears, RANK, seed=args.seed * 1000 + index)
        weights = 2 * sum(map(weights_bytes, folders.values()))
        memory = kv_tokens * kv_token_bytes(model, args.dtype) + weights + _SLACK
        settings = ServerSettings(
            str(model),
            args.dtype,
            args.threads,
            max_running=max_running,
            memory=memory,
            max_slots=max(num_adapters, 64),
            speculation="off",
        )
        progress(f"a server with --memory {format_size(memory)}; uploading {num_adapters} adapters")
        with running_server(settings, work / "store", work / "server.log") as server:
            upload_all(server.target, folders)
            yield Scene(server, tuple(folders))


async def until(holds: Callable[[], bool], streams: "asyncio.Task[list[Outcome]]") -> None:
    """BenchmarkError where the streams have ended and it does not hold."""
    while not holds():
        if streams.done():
            streams.result()
            raise BenchmarkError("the streams ended before all was measured: let them be longer")
        await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)


def all_decode(outcomes: Sequence[Outcome], number: int) -> bool:
    """So many streams were begun, and each has had a token after its first."""
    return len(outcomes) == number and all(len(outcome.arrivals) > 1 for outcome in outcomes)
