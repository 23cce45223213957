"""A stream hands over every token once, in order, and then its end; and it is bounded."""

import asyncio

import pytest
from loraplex.engine.sequence import (
    Finished,
    FinishReason,
    Logprobs,
    SamplingParams,
    Sequence,
    StopParams,
    Timings,
    Tokens,
)
from loraplex.engine.stream import Event, TokenStream
from loraplex.errors import RequestError

END = Finished(FinishReason.LENGTH, None, 0, Timings())
INTERNAL = RequestError("INTERNAL", "internal error")


def stream(limit: int = 100) -> tuple[TokenStream, list[str]]:
    sequence = Sequence("r1", [1], SamplingParams(), StopParams(5), submitted_at=2.0)
    overflowed: list[str] = []
    return TokenStream(sequence, limit, lambda: 5.0, overflowed.append), overflowed


def tokens(*token_ids: int) -> Tokens:
    return Tokens(token_ids, tuple(Logprobs(-float(t), ()) for t in token_ids))


async def read(source: TokenStream) -> list[Event]:
    """Everything up to the end, an error as the last event."""
    events: list[Event] = []
    try:
        async for event in source:
            events.append(event)
    except RequestError as error:
        events.append(error)
    return events


@pytest.mark.parametrize(
    ("pushed", "expected"),
    [
        ([END], [END]),
        ([tokens(1), END], [tokens(1), END]),
        ([tokens(1), tokens(2, 3), tokens(4), END], [tokens(1, 2, 3, 4), END]),
        ([tokens(1), tokens(2), INTERNAL], [tokens(1, 2), INTERNAL]),
        ([tokens(1), END, tokens(2), INTERNAL], [tokens(1), END]),
        ([INTERNAL, END], [INTERNAL]),
    ],
)
def test_read_late(pushed: list[Event], expected: list[Event]) -> None:
    """What piled up comes as one; what follows the end is dropped."""

    async def scenario() -> list[Event]:
        source, _ = stream()
        for event in pushed:
            source.push(event)
        return await read(source)

    assert asyncio.run(scenario()) == expected


def test_read_as_it_comes() -> None:
    async def scenario() -> list[Event]:
        source, _ = stream()
        reader = asyncio.create_task(read(source))
        for event in (tokens(1), tokens(2), END):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            source.push(event)
        return await reader

    assert asyncio.run(scenario()) == [tokens(1), tokens(2), END]


def test_a_slow_reader_keeps_what_fitted_and_is_told() -> None:
    async def scenario() -> list[Event]:
        source, overflowed = stream(limit=3)
        for token in range(3):
            source.push(tokens(token))
        assert overflowed == []
        source.push(tokens(3))
        source.push(tokens(4))
        assert overflowed == ["r1"]
        return await read(source)

    events = asyncio.run(scenario())
    assert events[0] == tokens(0, 1, 2)
    assert isinstance(events[1], RequestError)
    assert events[1].reason.name == "SLOW_READER"
    assert len(events) == 2


def test_the_limit_is_on_what_is_unread() -> None:
    async def scenario() -> list[str]:
        source, overflowed = stream(limit=3)
        reader = aiter(source)
        for token in range(10):
            source.push(tokens(token, token))
            assert await anext(reader) == tokens(token, token)
        return overflowed

    assert asyncio.run(scenario()) == []


def test_timings_at_any_moment() -> None:
    async def scenario() -> Timings:
        return stream()[0].timings()

    assert asyncio.run(scenario()) == Timings(queue=3.0)
