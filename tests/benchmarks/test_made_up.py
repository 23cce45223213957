"""Adapters that are on a server only while a benchmark runs."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from child import BenchmarkError
from loraplex.model.config import LinearShape, linear_prefix
from loraplex_client import AsyncClient
from loraplex_protos.v1 import adapters_pb2
from made_up import MadeUp, missing, names_of

from tests.clients.conftest import FakeServer, refuse, server

__all__ = ["server"]  # a fixture

LINEARS = [LinearShape(f"{linear_prefix(0, 'q_proj')}.q_proj", 0, "q_proj", 12, 8)]
NAMES = names_of(3, [4, 8], seed=2)


def on(server: FakeServer, folder: Path, act: Callable[[MadeUp, AsyncClient], object]) -> None:
    """Uploads adapters of NAMES, and acts while they are there."""

    async def main() -> None:
        async with AsyncClient(server.target) as client:
            made_up = MadeUp(client, "tiny", folder, lambda model: LINEARS)
            reports: list[tuple[int, int]] = []
            ranks = dict(zip(NAMES, (4, 8, 4), strict=True))
            try:
                await made_up.upload(ranks, 1, lambda *report: reports.append(report))
                assert reports == [(1, 3), (2, 3), (3, 3)]
                assert await missing(client, [*NAMES, "x"]) == ["x"]
                act(made_up, client)
            finally:
                await made_up.delete()

    asyncio.run(main())


def test_names_say_rank_and_seed() -> None:
    assert NAMES == ["bench-s2-0000-r4", "bench-s2-0001-r8", "bench-s2-0002-r4"]
    assert names_of(0, [16], 1) == []


def test_they_come_and_go(server: FakeServer, tmp_path: Path) -> None:
    def look(made_up: MadeUp, client: AsyncClient) -> None:
        assert sorted(server.adapters) == sorted(NAMES)
        assert len({*server.weights.values()}) == 3
        assert [*tmp_path.iterdir()] == []
        del server.adapters[NAMES[2]]  # somebody else was faster

    on(server, tmp_path, look)

    assert server.adapters == {}


def test_those_that_were_there_stay(server: FakeServer, tmp_path: Path) -> None:
    server.store(adapters_pb2.UploadHeader(adapter_id=NAMES[1]), b"")

    on(server, tmp_path, lambda made_up, client: None)

    assert [*server.adapters] == [NAMES[1]]


def test_another_model_is_named_as_the_reason(server: FakeServer, tmp_path: Path) -> None:
    def unfit(fake: FakeServer, requests: object, context: object) -> object:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "BAD_TENSOR", "q_proj does not fit")

    server.upload = unfit
    with pytest.raises(BenchmarkError, match=r"q_proj does not fit \(they are made for --model"):
        on(server, tmp_path, lambda made_up, client: None)
