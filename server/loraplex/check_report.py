"""What `loraplex check` prints: a table for a person, one JSON object for a program.

    {"device", "target", "driver", "torch", "triton",   what was checked on, and with
     "model", "max_rank",                               whose shapes; null: tiny ones alone
     "copy_bytes_per_second",                           the device's, read and written
     "passed": bool, "failed": ["triton attention"],    ops and kernel
     "cases": [{"ops", "kernel", "case", "rows", "dtype", "error", "limit", "passed", "failure",
                "seconds", "bytes_moved", "bytes_per_second", "of_copy"}],
     "paths": {"4096x4096": [[1, "fused"], [65, "bitsandbytes"]]} or null,
     "notes": ["..."]}

The interpreter's cases are of tiny shapes. `error` is max |error| / max |expected| against plain
fp32 maths. `seconds`, and what follows from it, is null for what failed and in the interpreter.
`bytes_moved` is the floor: each byte that the op must touch, once. `paths` is what was measured
and stored, by out x in features: from so many rows on, this path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from loraplex_client.render import write, write_json, write_table
from loraplex_kernels.check import LIMITS, Outcome
from loraplex_kernels.gpu.paths import PathTable
from loraplex_kernels.isolated import OpsName
from loraplex_kernels.verdicts import Environment

_HEADER = ("ops", "kernel", "case", "rows", "error", "time", "moved", "rate", "of copy", "verdict")


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of ops, checked in one dtype."""

    ops: OpsName
    dtype: torch.dtype
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run of the command found."""

    device: str
    target: str | None  # None: no GPU
    environment: Environment
    model: str | None  # whose shapes; None: tiny ones alone, for the interpreter
    max_rank: int
    copy_bytes_per_second: float
    sections: tuple[Section, ...]
    paths: PathTable | None  # None: not measured
    notes: tuple[str, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """`triton attention`, in the order of the cases."""
        names = [
            f"{section.ops} {outcome.kernel}"
            for section in self.sections
            for outcome in section.outcomes
            if outcome.failure is not None
        ]
        return tuple(dict.fromkeys(names))


def print_json(report: Report, out: TextIO) -> None:
    environment = report.environment
    paths = report.paths
    write_json(
        {
            "device": _name(report),
            "target": report.target,
            "driver": environment.driver,
            "torch": environment.torch_version,
            "triton": environment.triton_version,
            "model": report.model,
            "max_rank": report.max_rank,
            "copy_bytes_per_second": report.copy_bytes_per_second,
            "passed": not report.failed,
            "failed": report.failed,
            "cases": [
                _case(section, outcome, report.copy_bytes_per_second)
                for section in report.sections
                for outcome in section.outcomes
            ],
            "paths": None if paths is None else paths.plain(),
            "notes": report.notes,
        },
        out,
    )


def _name(report: Report) -> str:
    return report.environment.device if report.target else report.device


def _case(section: Section, outcome: Outcome, copy_bytes_per_second: float) -> dict[str, object]:
    rate = outcome.bytes_per_second
    return {
        "ops": section.ops,
        "kernel": outcome.kernel,
        "case": outcome.case,
        "rows": outcome.num_rows,
        "dtype": str(section.dtype).removeprefix("torch."),
        "error": outcome.error,
        "limit": LIMITS[section.dtype],
        "passed": outcome.failure is None,
        "failure": outcome.failure,
        "seconds": outcome.seconds,
        "bytes_moved": outcome.bytes_moved,
        "bytes_per_second": rate,
        "of_copy": None if rate is None else rate / copy_bytes_per_second,
    }


def print_report(report: Report, out: TextIO) -> None:
    target = f" ({report.target})" if report.target else ""
    speed = f"{_giga(report.copy_bytes_per_second)} GB/s in a copy"
    write(f"{_name(report)}{target}, {_shapes(report)}; {speed}\n\n", out)
    rows = [
        _row(section, outcome, report.copy_bytes_per_second)
        for section in report.sections
        for outcome in section.outcomes
    ]
    write_table(_HEADER, rows, out)
    passed = sum(row[-1] == "ok" for row in rows)
    write(f"\n{passed} of {len(rows)} cases passed\n", out)
    print_notes(report.notes, out)


def print_notes(notes: Sequence[str], out: TextIO) -> None:
    """Nothing where there are none."""
    write("".join(f"{note}\n" for note in notes), out)


def _shapes(report: Report) -> str:
    if report.model is None:
        return "tiny shapes"
    is_mixed = any(section.ops == "interpreter" for section in report.sections if section.outcomes)
    return f"shapes of {report.model}" + (", tiny ones in the interpreter" if is_mixed else "")


def _row(section: Section, outcome: Outcome, copy_bytes_per_second: float) -> tuple[str, ...]:
    rate = outcome.bytes_per_second
    return (
        section.ops,
        outcome.kernel,
        outcome.case,
        str(outcome.num_rows),
        "-" if outcome.error is None else f"{outcome.error:.1e}",
        "-" if outcome.seconds is None else _time(outcome.seconds),
        f"{outcome.bytes_moved / 1e6:.2f} MB",
        "-" if rate is None else f"{_giga(rate)} GB/s",
        "-" if rate is None else f"{rate / copy_bytes_per_second:.0%}",
        "ok" if outcome.failure is None else f"FAILED: {outcome.failure}",
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.2f}" if rate < 1e10 else f"{rate / 1e9:.0f}"
