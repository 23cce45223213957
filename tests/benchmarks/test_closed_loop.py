"""Who asks what next, and what of the arrivals falls into a window."""

import asyncio

import pytest
from closed_loop import Answer, Ask, Prompts, pauses_within, stop, tokens_within
from figures import Arrival

ASK = Ask((1, 2), None, 4)


def answer(*seconds: float, sent: float = 0.0) -> Answer:
    return Answer(ASK, sent, [Arrival(second, 2) for second in seconds])


def test_first_token_counts_from_sending() -> None:
    assert answer(5.0, 6.0, sent=4.5).first_token == pytest.approx(0.5)


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
    assert pauses_within([answer(1.0, 2.0, 3.0, 4.0, 6.0)], [window]) == pauses


def test_a_pause_in_two_windows_counts_once() -> None:
    assert pauses_within([answer(0.0, 9.0)], [(1.0, 2.0), (3.0, 4.0)]) == [9.0]


def test_tokens_within_counts_all_of_a_delta() -> None:
    assert tokens_within([answer(1.0, 2.0), answer(2.5, 3.0)], 2.0, 3.0) == 4


def test_prompts_differ_and_the_seed_decides() -> None:
    first, other = Prompts(100, 8, seed=1), Prompts(100, 8, seed=1)
    prompts = [first.next() for _ in range(5)]

    assert prompts == [other.next() for _ in range(5)]
    assert len({*prompts}) == 5
    assert {len(prompt) for prompt in prompts} == {8}


def test_stopping_tells_errors_but_no_cancel() -> None:
    async def endless() -> list[Answer]:
        await asyncio.sleep(60)
        return []

    async def failing() -> list[Answer]:
        raise ValueError("no answer")

    async def main() -> None:
        await stop(asyncio.create_task(endless()))
        task = asyncio.create_task(failing())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="no answer"):
            await stop(task)

    asyncio.run(main())
