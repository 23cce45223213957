"""Who asks what next, how a stream is written down, and what of it falls into a window."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from closed_loop import Clients, Prompts, pauses_within, stop, tokens_within
from loraplex_client import AsyncClient, ResourceExhausted
from loraplex_protos.v1 import inference_pb2
from outcome import Outcome
from workload import Request

from tests.benchmarks.timelines import outcome
from tests.clients.conftest import FakeServer, refuse, server

__all__ = ["server"]  # a fixture


class Twice:
    """A load of two requests a client. Mutable: `done_by`, in order."""

    def __init__(self) -> None:
        self._left = {0: ["a", "b"], 1: ["a", "b"]}
        self.done_by: list[str | None] = []

    def next(self, client: int) -> Request | None:
        return Request((1, 2), self._left[client].pop(0), 3) if self._left[client] else None

    def done(self, request: Request) -> None:
        self.done_by.append(request.adapter)


def run(clients: int, load: Twice, target: str) -> tuple[list[Outcome], Exception | None]:
    """All outcomes, and the error that ended them."""

    async def main() -> tuple[list[Outcome], Exception | None]:
        async with AsyncClient(target) as client:
            each = Clients(client, clients)
            try:
                assert await each.run(load) == each.outcomes
            except ResourceExhausted as error:
                return each.outcomes, error
            return each.outcomes, None

    return asyncio.run(main())


def test_streams_are_written_down(server: FakeServer) -> None:
    def tokens(request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        started = inference_pb2.Started(prompt_tokens=2, cached_tokens=1)
        yield inference_pb2.GenerateResponse(started=started)
        for ids in ([1], [], [2, 3]):
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(token_ids=ids))
        timings = inference_pb2.Timings(adapter_wait=0.5)
        yield inference_pb2.GenerateResponse(finished=inference_pb2.Finished(timings=timings))

    server.generate = tokens
    load = Twice()
    outcomes, error = run(2, load, server.target)

    assert error is None
    assert sorted(filter(None, load.done_by)) == ["a", "a", "b", "b"]
    assert len(outcomes) == 4
    for each in outcomes:
        assert each.is_complete
        assert (each.counts, each.cached_tokens) == ([1, 2], 1)
        assert each.timings is not None
        assert each.timings.adapter_wait == 0.5
        assert each.sent is not None
        assert each.ended is not None
        moments = [each.due, each.sent, *each.arrivals, each.ended]
        assert moments == sorted(moments)


def test_an_error_ends_the_clients_and_is_written_down(server: FakeServer) -> None:
    def full(request: Any, context: Any) -> Iterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(token_ids=[1]))
        refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full")

    server.generate = full
    load = Twice()
    [one], error = run(1, load, server.target)

    assert isinstance(error, ResourceExhausted)
    assert load.done_by == []
    assert (one.counts, one.error) == ([1], "RESOURCE_EXHAUSTED QUEUE_FULL")
    assert one.ended is not None
    assert not one.is_complete


def test_first_token_counts_from_being_due() -> None:
    assert outcome(4.5, 5.0, 6.0, sent=4.75).first_token == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("window", "pauses"),
    [
        pytest.param((2.5, 2.75), [1.0], id="inside one pause"),
        pytest.param((2.5, 4.5), [1.0, 1.0, 2.0], id="those that it cuts count whole"),
        pytest.param((3.0, 4.0), [1.0], id="those that only touch it do not"),
        pytest.param((0.0, 1.0), [], id="before the first token"),
        pytest.param((6.0, 9.0), [], id="after the last"),
    ],
)
def test_pauses_within_a_window(window: tuple[float, float], pauses: list[float]) -> None:
    assert pauses_within([outcome(0.0, 1.0, 2.0, 3.0, 4.0, 6.0)], [window]) == pauses


def test_a_pause_in_two_windows_counts_once() -> None:
    assert pauses_within([outcome(0.0, 0.0, 9.0)], [(1.0, 2.0), (3.0, 4.0)]) == [9.0]


def test_tokens_within_counts_all_of_a_delta() -> None:
    outcomes = [
        outcome(0.0, 1.0, 2.0, 3.0, 4.0, counts=(2, 2, 2, 2)),
        outcome(0.0, 2.5, 4.0, counts=(2, 2)),
    ]

    assert outcomes[0].tokens_between(2.0, 4.0) == 4
    assert tokens_within(outcomes, 2.0, 4.0) == 6


def test_prompts_differ_and_the_seed_decides() -> None:
    first, other = Prompts(100, 8, seed=1), Prompts(100, 8, seed=1)
    prompts = [first.next() for _ in range(5)]

    assert prompts == [other.next() for _ in range(5)]
    assert len({*prompts}) == 5
    assert {len(prompt) for prompt in prompts} == {8}


def test_stopping_tells_errors_but_no_cancel() -> None:
    async def endless() -> list[Outcome]:
        await asyncio.sleep(60)
        return []

    async def failing() -> list[Outcome]:
        raise ValueError("no answer")

    async def main() -> None:
        await stop(asyncio.create_task(endless()))
        task = asyncio.create_task(failing())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="no answer"):
            await stop(task)

    asyncio.run(main())
