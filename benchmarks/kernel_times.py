"""The kernel benchmark's figures as Markdown, and for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kernel_lines import BANDWIDTH, OURS, PATHS, TORCH, Line

LABELS = ("models", "op", "rows", "rank", "popularity", "adapters", "MB")


def floors(lines: Sequence[Line]) -> str:
    """For a machine without a GPU: bytes, and what they would take at a device's bandwidth."""
    header = [*LABELS, *(f"{device} us" for device in BANDWIDTH)]
    rows = [
        [*_labels(line), *(_microseconds(line.bytes_moved / rate) for rate in BANDWIDTH.values())]
        for line in lines
    ]
    return _table(header, rows)


def times(lines: Sequence[Line], bytes_per_second: float) -> str:
    """As measured, beside the floor at the bandwidth of a copy; the base's ways side by side."""
    of_base = [line for line in lines if line.kernel == "nf4_linear"]
    others = [line for line in lines if line.kernel != "nf4_linear"]
    tables = [
        _timed(part, ways, bytes_per_second)
        for part, ways in ((of_base, (*PATHS, TORCH)), (others, (OURS, TORCH)))
        if part
    ]
    return "\n\n".join(tables)


def _timed(lines: Iterable[Line], ways: Sequence[str], bytes_per_second: float) -> str:
    header = [*LABELS, "floor us", *(f"{way} us" for way in ways), "floor / best", "torch / best"]
    rows = []
    for line in lines:
        floor = line.bytes_moved / bytes_per_second
        rows.append(
            [
                *_labels(line),
                _microseconds(floor),
                *(_microseconds(line.seconds.get(way)) for way in ways),
                f"{floor / line.best:.0%}" if line.best else "",
                f"{line.times_torch:.1f}" if line.times_torch else "",
            ]
        )
    return _table(header, rows)


def as_json(lines: Iterable[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def conditions(about: Mapping[str, Any], dtype: str) -> str:
    """What a reader of the table alone must know."""
    packages = ", ".join(f"{name} {found}" for name, found in about["packages"].items() if found)
    return f"{dtype}; {about['cpu']}; {packages}; revision {about['revision']}; {about['date']}."


def _labels(line: Line) -> list[str]:
    return [
        line.models,
        f"{line.kernel} {line.what}".strip(),
        str(line.rows),
        "" if line.rank is None else str(line.rank),
        line.popularity or "",
        str(line.num_adapters or ""),
        f"{line.bytes_moved / 1e6:.2f}",
    ]


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))
