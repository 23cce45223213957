"""What the commands print: text a terminal may see, JSON lines, tables, a progress bar.

A pipe never gets an escape code; a terminal never gets one that a model or a server sent. rich is
imported when a terminal is there to draw on, and not before.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, TextIO

from loraplex_client.errors import LoraplexError
from loraplex_client.values import Event

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


def printable(text: str) -> str:
    """`text` without control characters: what others wrote must not steer a terminal."""
    return _CONTROLS.sub("", text)


def one_line(text: str) -> str:
    return " ".join(printable(text.replace("\r", "\n")).split())


def write(text: str, out: TextIO) -> None:
    """At once, as it is into a pipe, and harmless on a terminal."""
    out.write(printable(text) if out.isatty() else text)
    out.flush()


def plain(value: object) -> Any:
    """A value of this package as JSON holds it: datetimes as ISO 8601, no NaN or infinity."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(value: object, out: TextIO) -> None:
    """One line."""
    out.write(json.dumps(plain(value)) + "\n")
    out.flush()


def event_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__.lower(), **plain(event)}


def error_json(error: LoraplexError) -> dict[str, Any]:
    return {
        "event": "error",
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "retry_after": error.retry_after,
    }


def human_bytes(count: int) -> str:
    """1300000 -> "1.2 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def ago(when: datetime | None, now: datetime) -> str:
    """`3 min ago`; `never` for None."""
    if when is None:
        return "never"
    seconds = max(0.0, (now - when).total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{int(seconds)} s ago"


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> None:
    """A drawn table on a terminal that is wide enough, else aligned columns, as in a pipe."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not out.isatty() or not _draw_table(header, cells, out):
        _write_columns([header, *cells], out)


def _draw_table(header: Sequence[str], rows: Sequence[Sequence[str]], out: TextIO) -> bool:
    """False, and nothing drawn, where cells would be cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=out)
    wanted = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if wanted > console.width:
        return False
    console.print(table)
    return True


def write_pairs(pairs: Mapping[str, object], out: TextIO) -> None:
    """A line for each, the values below one another."""
    _write_columns([(name, one_line(str(value))) for name, value in pairs.items()], out)


def _write_columns(lines: Sequence[Sequence[str]], out: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        out.write("  ".join(padded).rstrip() + "\n")
    out.flush()


@contextmanager
def progress_bar(label: str, out: TextIO) -> Iterator[Callable[[int, int], None] | None]:
    """A callback of (sent_bytes, total_bytes) that draws on a terminal; None in a pipe."""
    if not out.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(file=out), transient=True) as bars:
        task = bars.add_task(printable(label), total=None)

        def show(sent: int, total: int) -> None:
            bars.update(task, completed=sent, total=total)

        yield show
