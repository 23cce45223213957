"""Adapters that a benchmark makes up, and that are on a server only while it runs."""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from child import BenchmarkError, first_error
from loraplex_client import AsyncClient, InvalidArgument, LoraplexError, NotFound

_AT_ONCE = 2


def names_of(number: int, ranks: Sequence[int], seed: int) -> list[str]:
    """The same names for the same content."""
    return [f"bench-s{seed}-{i:04}-r{ranks[i % len(ranks)]}" for i in range(number)]


def linears_of_model(model: str) -> list[Any]:
    """What an adapter for this checkpoint adapts, as `LinearShape`s."""
    from adapter_files import linears_of  # imports torch, which not every run needs
    from lifecycle import model_folder

    return linears_of(model_folder(model))


class MadeUp:
    """Random adapters, written one by one, uploaded, and deleted from the disk at once.

    Mutable: `_uploaded`, the names that were not on the server before.
    """

    def __init__(
        self,
        client: AsyncClient,
        model: str,
        folder: Path,
        shapes: Callable[[str], list[Any]] = linears_of_model,
    ) -> None:
        self._client = client
        self._model = model
        self._folder = folder
        self._shapes = shapes
        self._uploaded: list[str] = []

    async def upload(
        self, ranks: Mapping[str, int], seed: int, report: Callable[[int, int], None]
    ) -> None:
        """Adapters of these ranks by name; BenchmarkError where the server cannot have them."""
        from adapter_files import write_adapter

        linears = await asyncio.to_thread(self._shapes, self._model)
        left = iter(enumerate(ranks.items()))
        done = count(1)

        async def worker() -> None:
            for number, (name, rank) in left:
                folder = self._folder / name
                await asyncio.to_thread(
                    write_adapter, folder, linears, rank, seed=seed * 1000 + number
                )
                try:
                    await self._send(name, folder)
                finally:
                    shutil.rmtree(folder)
                report(next(done), len(ranks))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(_AT_ONCE, len(ranks))):
                    group.create_task(worker())
        except* (BenchmarkError, LoraplexError, OSError) as errors:
            raise first_error(errors) from None

    async def delete(self) -> None:
        """Those that this uploaded, and nobody has deleted since."""
        while self._uploaded:
            with suppress(NotFound):
                await self._client.delete_adapter(self._uploaded[-1])
            self._uploaded.pop()

    async def _send(self, name: str, folder: Path) -> None:
        try:
            result = await self._client.upload_adapter(name, folder)
        except InvalidArgument as error:
            raise BenchmarkError(
                f"the server does not take the made-up adapter {name}: {error} "
                f"(they are made for --model {Path(self._model).name})"
            ) from None
        if result.created:
            self._uploaded.append(name)


async def missing(client: AsyncClient, names: Sequence[str]) -> list[str]:
    """Those that the server does not have."""
    absent = []
    for name in names:
        try:
            await client.get_adapter(name)
        except NotFound:
            absent.append(name)
    return absent
