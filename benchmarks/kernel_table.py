"""The compile report as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from gates import Row, gate

SUMMARY = (
    "kernel",
    "target",
    "configurations",
    "registers",
    "spills",
    "shared KB",
    "SASS a weight",
)
DETAILS = (
    "configuration",
    "target",
    "registers",
    "stack",
    "spills",
    "shared bytes",
    "warps",
    "stages",
    "tensor core",
    "128-bit",
    "SASS a weight",
)


def markdown(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """The largest of each kernel and target first, then every row."""
    refused = sum(1 for row in rows if gate(row))
    lines = [
        "# Kernels as compiled",
        "",
        f"{len(rows)} compilations, {refused} of them refused. Compiled ahead of time with Triton "
        f"{about['triton']} and ptxas {about['ptxas']} (from sm_90 on {about['ptxas-blackwell']}), "
        "without a GPU; nothing here was run. "
        f"Made by `{about['command']}` from sources {about['sources'][:12]}.",
        "",
        "## The largest of each kernel",
        "",
        largest(rows),
    ]
    for name in dict.fromkeys(_name(row) for row in rows):
        own = [row for row in rows if _name(row) == name]
        lines += ["", f"## {name}", "", *_table(DETAILS, _details(own))]
    return "\n".join(lines) + "\n"


def largest(rows: Sequence[Row]) -> str:
    """A table of the most that any configuration of a kernel takes on a target."""
    return "\n".join(_table(SUMMARY, map(_summary, _groups(rows))))


def _name(row: Row) -> str:
    return f"{row.kernel}.{row.function}"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """By kernel and target, in the order in which they first come."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for name in dict.fromkeys(_name(row) for row in rows):
        for row in rows:
            if _name(row) == name:
                groups.setdefault((name, row.target), []).append(row)
    return list(groups.values())


def _summary(rows: Sequence[Row]) -> list[str]:
    per_weight = [row.sass_a_weight for row in rows if row.sass_a_weight is not None]
    return [
        _name(rows[0]),
        rows[0].target,
        str(len(rows)),
        str(max(row.registers for row in rows)),
        str(sum(row.spills for row in rows)),
        f"{max(row.shared for row in rows) / 1024:.1f}",
        _number(max(per_weight, default=None)),
    ]


def _details(rows: Iterable[Row]) -> Iterator[list[str]]:
    """A configuration is named once, with the targets below it."""
    configs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        configs.setdefault((row.config, _types(row)), []).append(row)
    for own in configs.values():
        for index, row in enumerate(own):
            yield [
                row.config if index == 0 else "",
                row.target,
                str(row.registers),
                str(row.stack),
                str(row.spills),
                str(row.shared),
                str(row.warps),
                str(row.stages),
                str(row.tensor_core),
                str(row.wide),
                _number(row.sass_a_weight),
            ]


def _types(row: Row) -> str:
    """The arguments, whatever a target assumes of where they point."""
    return row.arguments.replace("/2GB", "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(header), ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
