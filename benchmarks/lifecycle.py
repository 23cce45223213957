"""A server process of the benchmark's own: started with its settings, asked what it counted.

Shared by all commands that start servers, through scenario.py by those about load.
"""

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

from child import BenchmarkError, Child
from loraplex.config import cache_dir
from loraplex.model.config import read_model_config
from loraplex.model.hub import resolve_model
from loraplex_client import AsyncClient
from peers.loraplex_grpc import address, serve_command
from prometheus_client.parser import text_string_to_metric_families

_METRICS = re.compile(r"metrics on (http://\S+)")
_SECONDS_TO_SCRAPE = 30.0
_UPLOADS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What differs from one server to another."""

    model: str
    dtype: str
    threads: int
    max_running: int = 64
    memory: int | None = None  # bytes
    max_slots: int | None = None
    speculation: str = "auto"

    def command(self, store: Path) -> list[str]:
        """For `Child`; where a flag is given twice, the last one counts."""
        command = serve_command(
            model=self.model,
            dtype=self.dtype,
            threads=self.threads,
            max_running=self.max_running,
            store=store,
            speculation=self.speculation,
        )
        command += ["--metrics", "127.0.0.1:0", "--log-level", "info"]
        for flag, value in (("--memory", self.memory), ("--max-slots", self.max_slots)):
            command += [] if value is None else [flag, str(value)]
        return command


class Counters:
    """One scrape of /metrics."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels; 0 where there are none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"loraplex_{name}" and labels.items() <= sample.labels.items()
        )

    def mean_since(self, before: "Counters", histogram: str) -> float | None:
        """What was observed between two scrapes, on average; None: nothing was."""
        total, count = (
            self.value(f"{histogram}_{part}") - before.value(f"{histogram}_{part}")
            for part in ("sum", "count")
        )
        return total / count if count else None

    def since(self, before: "Counters", name: str, **labels: str) -> float:
        return self.value(name, **labels) - before.value(name, **labels)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready."""

    target: str  # HOST:PORT
    seconds_to_ready: float  # from starting the process to its ready line
    metrics_url: str
    pid: int

    def counters(self) -> Counters:
        with urlopen(self.metrics_url, timeout=_SECONDS_TO_SCRAPE) as answer:
            return Counters(answer.read().decode())


@contextmanager
def running_server(settings: ServerSettings, store: Path, log: Path) -> Iterator[Server]:
    """Ready when entered, ended when left; the store stays."""
    started = time.monotonic()
    with Child("the server", settings.command(store), log) as child:
        target = address(child)
        seconds = time.monotonic() - started
        metrics = metrics_url(log.read_text(errors="replace"))
        yield Server(target, seconds, metrics, child.pid)


def metrics_url(log: str) -> str:
    """Where a server says in its log that its metrics are."""
    found = _METRICS.search(log)
    if found is None:
        raise BenchmarkError("the server does not say where its metrics are")
    return found[1]


def model_folder(model: str) -> Path:
    return resolve_model(model, cache_dir()).resolve()


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def kv_token_bytes(model: Path, dtype: str) -> int:
    """What one token's keys and values take over all layers."""
    config = read_model_config(model)
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize(dtype)


async def block_bytes(server: Server, client: AsyncClient) -> int:
    """Of one block of the memory for KV and adapters."""
    info = await client.server_info()
    return info.limits.memory_bytes // round(server.counters().value("memory_blocks"))


async def make_resident(client: AsyncClient, adapters: Iterable[str]) -> None:
    """By a short request for each."""
    for name in adapters:
        await client.complete(token_ids=[0], adapter_id=name, max_tokens=1)


def upload_all(target: str, adapters: Mapping[str, Path]) -> None:
    """A few at a time."""
    asyncio.run(_upload_all(target, adapters))


async def _upload_all(target: str, adapters: Mapping[str, Path]) -> None:
    left = iter(adapters.items())

    async def worker(client: AsyncClient) -> None:
        for name, folder in left:
            await client.upload_adapter(name, folder)

    async with AsyncClient(target) as client, asyncio.TaskGroup() as group:
        for _ in range(_UPLOADS_AT_ONCE):
            group.create_task(worker(client))
