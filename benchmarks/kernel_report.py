"""Compile every Triton kernel for GPUs that are not there, and hold it to the gates.

python benchmarks/kernel_report.py --help
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compiling import NVIDIA_TOOLS
from environment import cores
from gates import TARGETS, Row, gate
from kernel_table import markdown
from loraplex_kernels.gpu.ops import KERNELS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sources import source_hash

BENCHMARKS = Path(__file__).resolve().parent
REPORT = BENCHMARKS / "results" / "kernels"
DESCRIPTION = """\
Compile every Triton kernel, in every configuration that ships, for GPUs that this machine need not
have, and refuse those that spill, do without tensor cores or 128-bit accesses, or draw a remark
from a compiler. The real launchers run on tensors without memory; only the launch is replaced.
"""

Heard = Callable[[str, int, int], None]
"""Told the target, the cases done, and of how many."""


@dataclass(slots=True)
class Report:
    """Mutable: filled target by target."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # what did not compile

    def refused(self) -> list[str]:
        """Every gate that failed, by name of kernel, configuration and target."""
        return self.failures + [f"{row}: {why}" for row in self.rows for why in gate(row)]


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, 1 where a gate failed, 130 after Ctrl-C."""
    args = _build_parser().parse_args(argv)
    try:
        with _progress(args.targets) as heard:
            report = compile_kernels(args.targets, args.kernels, args.subset, args.jobs, heard)
    except KeyboardInterrupt:
        return 130
    if args.out is not None:
        write(report, args.out, shlex.join(["python", "benchmarks/kernel_report.py", *argv]))
    refused = report.refused()
    for line in refused:
        sys.stderr.write(f"refused: {line}\n")
    verdict = f"{len(refused)} refusals" if refused else "every gate passed"
    sys.stdout.write(
        f"{len(report.rows)} compilations for {len(args.targets)} targets: {verdict}\n"
    )
    return 1 if refused else 0


def compile_kernels(
    targets: Sequence[str], kernels: Sequence[str], is_subset: bool, jobs: int, heard: Heard
) -> Report:
    """A child process for each target, `jobs` of them at a time; rows in the targets' order."""
    reports = [Report() for _ in targets]

    def compile_one(target: str, report: Report) -> None:
        for message in _messages(target, kernels, is_subset):
            if "row" in message:
                report.rows.append(row_of(message["row"]))
            elif "failure" in message:
                report.failures.append(message["failure"])
            else:
                heard(target, *message["case"])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, targets, reports))
    return Report(
        [r for one in reports for r in one.rows], [f for one in reports for f in one.failures]
    )


def row_of(values: dict[str, Any]) -> Row:
    """As it was before it was JSON."""
    return Row(**{**values, "diagnostics": tuple(values["diagnostics"])})


def _messages(target: str, kernels: Sequence[str], is_subset: bool) -> Iterator[dict[str, Any]]:
    """What compiling.py prints; its death is a failure like any other."""
    command = [sys.executable, "compiling.py", "--target", target, "--kernels", ",".join(kernels)]
    with tempfile.TemporaryDirectory(prefix="loraplex-compile-") as work:
        log = Path(work) / "stderr"
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                [*command, *(["--subset"] if is_subset else [])],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=BENCHMARKS,
                env=_child_environment(Path(work) / "cache"),
            ) as child,
        ):
            assert child.stdout is not None
            yield from map(json.loads, child.stdout)
        if child.returncode:
            yield {"failure": f"compiling for {target} ended early: {log.read_text().strip()}"}


def _child_environment(cache: Path) -> dict[str, str]:
    """Compiling needs real kernels; an old cache would hide what compilers say."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return {
        **kept,
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DUMP_PTXAS_LOG": "1",
        "OMP_NUM_THREADS": "1",
    }


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """What `write` wrote: what it was made from, and the rows."""
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return record["about"], [row_of(values) for values in record["rows"]]


def write(report: Report, path: Path, command: str) -> None:
    """As JSON, a row a line, and as Markdown."""
    about = {
        "command": command,
        "sources": source_hash(),
        "triton": version("triton"),
        "ptxas": _release("ptxas"),
        "ptxas-blackwell": _release("ptxas-blackwell"),
    }
    rows = [json.dumps(asdict(row)) for row in report.rows]
    text = json.dumps({"about": about, "rows": []}, indent=1)
    text = text.replace('"rows": []', '"rows": [\n  ' + ",\n  ".join(rows) + "\n ]")
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report.rows, about), encoding="utf-8")


def _release(ptxas: str) -> str:
    """Of an assembler in Triton's wheel."""
    command = [str(NVIDIA_TOOLS / ptxas), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return said.stdout.split("release ")[1].split(",")[0]


@contextmanager
def _progress(targets: Sequence[str]) -> Iterator[Heard]:
    """A bar for each target on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = {target: progress.add_task(target, total=None, start=False) for target in targets}

        def heard(target: str, done: int, total: int) -> None:
            if done == 1:
                progress.start_task(tasks[target])
            progress.update(tasks[target], completed=done, total=total)

        yield heard


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernel_report.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--targets",
        type=_names(TARGETS),
        default=",".join(TARGETS),
        metavar="T,T,...",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--kernels",
        type=_names(KERNELS),
        default=",".join(KERNELS),
        metavar="K,K,...",
        help="default: %(default)s",
    )
    parser.add_argument("--subset", action="store_true", help="fewer shapes, of one model")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(cores(), len(TARGETS)),
        metavar="N",
        help="targets at a time, 1 GB of memory each (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json and PATH.md")
    parser.add_argument(
        "--save",
        dest="out",
        action="store_const",
        const=REPORT,
        help="--out benchmarks/results/kernels",
    )
    return parser


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := {*names} - {*known}:
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not of {known}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
