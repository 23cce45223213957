"""Several answers at once: growing side by side on a terminal, one after the other in a pipe."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loraplex_client.render import printable

_NARROWEST = 36  # columns of a panel that can still be read
_SHORTEST, _TALLEST = 3, 16  # lines of a growing panel, its border included
_REFRESHES = 12  # a second
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


async def show_side_by_side(
    streams: Mapping[str, AsyncIterator[str]], console: Console
) -> dict[str, str]:
    """Reads every named stream of text to its end while showing all of them; their texts by name.

    A stream that fails ends the others, and its error is raised.
    """
    texts = dict.fromkeys(streams, "")

    async def read(name: str) -> None:
        async for piece in streams[name]:
            texts[name] += piece

    if console.is_terminal and not console.is_dumb_terminal:
        await _show_growing(texts, [read(name) for name in streams], console)
    else:
        await _together([_print_when_read(name, read(name), texts, console) for name in streams])
    return texts


async def _show_growing(
    texts: Mapping[str, str], readers: Sequence[Coroutine[None, None, None]], console: Console
) -> None:
    """While they grow, each panel shows the end of its text; at last, all of it is printed."""
    with Live(
        get_renderable=lambda: _panels(texts, console, console.height - 1),
        console=console,
        refresh_per_second=_REFRESHES,
        transient=True,
    ):
        await _together(readers)
    console.print(_panels(texts, console, None))


async def _print_when_read(
    name: str, reader: Coroutine[None, None, None], texts: Mapping[str, str], console: Console
) -> None:
    await reader
    console.out(f"== {printable(name)} ==\n{printable(texts[name])}\n", highlight=False)


async def _together(work: Sequence[Coroutine[None, None, None]]) -> None:
    """All of it, or the first error once the rest is cancelled and gone."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _panels(texts: Mapping[str, str], console: Console, height: int | None) -> RenderableType:
    """As many equal columns as stay readable; `height` is the lines there are, None for no end."""
    num_columns = max(1, min(len(texts), console.width // _NARROWEST))
    num_rows = -(-len(texts) // num_columns)
    lines = None
    if height is not None:
        lines = max(_SHORTEST, min(_TALLEST, height // max(1, num_rows))) - 2
    width = console.width // num_columns - 4  # without border and padding
    grid = Table.grid(expand=True)
    for _ in range(num_columns):
        grid.add_column(ratio=1)
    cells = [
        _panel(name, text, _COLOURS[index % len(_COLOURS)], width, lines, console)
        for index, (name, text) in enumerate(texts.items())
    ]
    for start in range(0, len(cells), num_columns):
        grid.add_row(*cells[start : start + num_columns])
    return grid


def _panel(
    name: str, text: str, colour: str, width: int, num_lines: int | None, console: Console
) -> Panel:
    """`num_lines` of text inside the border, the last ones; None: all of it."""
    body = Text(printable(text))
    if num_lines is not None:
        body = Text("\n").join(body.wrap(console, width)[-num_lines:])
    return Panel(
        body,
        title=Text(printable(name), style="bold"),
        title_align="left",
        border_style=colour,
        height=None if num_lines is None else num_lines + 2,
    )
