"""Several answers at once, on a terminal and in a pipe."""

import asyncio
import io
import re
from collections.abc import AsyncIterator

import pytest
from loraplex_client.side_by_side import show_side_by_side
from rich.console import Console


async def pieces(*texts: str, pause: float = 0.0) -> AsyncIterator[str]:
    for text in texts:
        await asyncio.sleep(pause)
        yield text


async def failing() -> AsyncIterator[str]:
    yield "so far"
    raise ZeroDivisionError("mine")


def console(terminal: bool, width: int = 100, height: int = 20) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, height=height, no_color=True
    )


def output(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_pipe_gets_each_answer_whole_when_it_is_done() -> None:
    pipe = console(terminal=False)
    streams = {
        "[slow]": pieces("a", "b" * 200, pause=0.05),
        "quick": pieces("c\n", "[bold]d"),
        "empty": pieces(),
    }
    texts = asyncio.run(show_side_by_side(streams, pipe))
    assert texts == {"[slow]": "a" + "b" * 200, "quick": "c\n[bold]d", "empty": ""}
    assert list(texts) == ["[slow]", "quick", "empty"]
    printed = output(pipe)
    assert "== quick ==\nc\n[bold]d\n\n" in printed
    assert "== empty ==\n\n\n" in printed
    assert printed.endswith(f"== [slow] ==\na{'b' * 200}\n\n")
    assert "\x1b" not in printed


def without_codes(screen: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output(screen))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_terminal_ends_with_every_answer_whole(width: int) -> None:
    screen = console(terminal=True, width=width, height=12)
    long = [f"word{number} " for number in range(60)]
    streams = {
        "base": pieces(*long, pause=0.002),
        "pirate": pieces("[bold]arr\x1b[2J", "!", pause=0.01),
        "poet": pieces("roses"),
    }
    texts = asyncio.run(show_side_by_side(streams, screen))
    assert texts["base"] == "".join(long)
    final = without_codes(screen).rsplit("╭─ base ", 1)[1]
    for text in ("pirate", "poet", "[bold]arr[2J!", "roses", *map(str.strip, long)):
        assert text in final
    assert all(len(line) <= width for line in final.splitlines()[1:])


def test_a_live_picture_fits_the_screen() -> None:
    screen = console(terminal=True, width=80, height=10)
    streams = {name: pieces(*["word\n"] * 50, pause=0.005) for name in "abcd"}
    asyncio.run(show_side_by_side(streams, screen))
    frames = without_codes(screen).split("╭─ a ")
    assert len(frames) > 2
    assert all(frame.count("\n") <= 10 for frame in frames[1:-1])


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_ends_the_others(terminal: bool) -> None:
    closed: list[bool] = []

    async def endless() -> AsyncIterator[str]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield "x"
        finally:
            closed.append(True)

    with pytest.raises(ZeroDivisionError, match="mine"):
        asyncio.run(show_side_by_side({"endless": endless(), "bad": failing()}, console(terminal)))
    assert closed == [True]


def test_nothing_to_show() -> None:
    for terminal in (False, True):
        assert asyncio.run(show_side_by_side({}, console(terminal))) == {}
