"""Loraplex: a real server process, reached through gRPC sockets by the product's own client."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from child import BenchmarkError, Child
from loraplex_client import AsyncClient, Delta, LoraplexError, ServerInfo
from peers.streams import Got, together
from waves import Reply, Wave


def serve_command(
    *,
    model: str,
    dtype: str,
    threads: int,
    max_running: int,
    store: Path,
    speculation: str = "auto",
) -> list[str]:
    """For `Child`: on a free port, nothing else running that would take time."""
    command = ["loraplex.cli", "serve", "--listen", "127.0.0.1:0", "--metrics", "off"]
    command += ["--model", model, "--dtype", dtype, "--threads", str(threads)]
    command += ["--max-running", str(max_running), "--store", str(store)]
    return [*command, "--speculation", speculation, "--log-level", "warning"]


def address(server: Child) -> str:
    """HOST:PORT, from the one line that a ready server writes."""
    return server.read().split(" on ", 1)[1].split(" ", 1)[0]


class Loraplex:
    """A closed loop of clients, one task and one stream each, over one connection.

    `pid` is the server's, where it is one of ours.

    Mutable: `_uploaded`, the names that were not on the server before; leaving deletes them.
    """

    def __init__(self, target: str, pid: int | None = None) -> None:
        self._target = target
        self.pid = pid
        self._uploaded: list[str] = []
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect())

    def info(self) -> ServerInfo:
        return self._runner.run(self._client.server_info())

    def upload(self, adapters: Mapping[str, Path]) -> None:
        for name, folder in adapters.items():
            if self._runner.run(self._client.upload_adapter(name, folder)).created:
                self._uploaded.append(name)

    def run(self, wave: Wave) -> list[Reply]:
        async def request(index: int, got: Got) -> None:
            events = self._client.stream(
                token_ids=wave.prompts[index],
                adapter_id=wave.adapters[index] or "",
                max_tokens=wave.max_tokens,
                ignore_eos=True,
                temperature=0.0,
                repetition_penalty=1.0,
            )
            async for event in events:
                if isinstance(event, Delta):
                    got(tuple(event.token_ids))

        return self._runner.run(together(wave, request))

    async def _connect(self) -> AsyncClient:
        return AsyncClient(self._target)

    async def _leave(self) -> None:
        for name in self._uploaded:
            await self._client.delete_adapter(name)
        await self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(LoraplexError):
            self._runner.run(self._leave())
        self._runner.close()


def check_limits(info: ServerInfo, *, batch: int, rank: int) -> None:
    """BenchmarkError where this server would queue or refuse what is to be measured."""
    if info.limits.max_running < batch:
        raise BenchmarkError(f"this server runs {info.limits.max_running} requests at most")
    if info.limits.max_rank < rank:
        raise BenchmarkError(f"this server takes adapters of rank {info.limits.max_rank} at most")
