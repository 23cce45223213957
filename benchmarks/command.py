"""What the commands around adapters have in common: options, signals, verdicts, what is saved."""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from child import BENCHMARKS, BenchmarkError
from environment import cores, environment, in_words
from loraplex.config import DEFAULT_MODEL
from loraplex.errors import LoraplexError as ServerSideError
from loraplex_client import LoraplexError

RESULTS = BENCHMARKS / "results"


@dataclass(frozen=True, slots=True)
class Check:
    """A figure beside its limit."""

    what: str
    value: float
    limit: float
    at_most: bool = True  # else: at least

    @property
    def passed(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        verdict = "PASS" if self.passed else "MISS"
        bound = "at most" if self.at_most else "at least"
        return f"{verdict}  {self.what}: {self.value:.4g} ({bound} {self.limit:g})"


@dataclass(frozen=True, slots=True)
class Findings:
    """What a benchmark has to say."""

    table: str  # Markdown
    figures: Mapping[str, Any]  # the same and more, for programs
    checks: Sequence[Check]


Benchmark = Callable[[argparse.Namespace], Findings]


def build_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_options(parser.add_argument_group("the server, which is the benchmark's own"))
    results = parser.add_argument_group("figures")
    results.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")
    results.add_argument("--out", type=Path, metavar="FILE", help="JSON, besides stdout")
    results.add_argument(
        "--save", metavar="NAME", help="benchmarks/results/NAME.json, and the table as NAME.md"
    )
    return parser


def add_server_options(group: Any) -> None:
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH|HUB_ID|NAME",
        help="a full-precision checkpoint, whose linears become NF4 (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s"
    )
    group.add_argument(
        "--threads", type=positive, default=cores(), metavar="N", help="default: one a core"
    )


def number(group: Any, flag: str, default: int, what: str) -> None:
    """A positive whole number, with its default in its help."""
    help_ = f"{what} (default: %(default)s)"
    group.add_argument(flag, type=positive, default=default, metavar="N", help=help_)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def run_command(parser: argparse.ArgumentParser, benchmark: Benchmark, argv: Sequence[str]) -> int:
    """The exit code: 0, 1 where a limit is missed or nothing was measured, 2 usage, 130 Ctrl-C."""
    args = parser.parse_args(argv)
    command = shlex.join(["python", f"benchmarks/{parser.prog}", *argv])
    about = {"command": command, **environment()}
    try:
        with ending_children():
            findings = benchmark(args)
    except KeyboardInterrupt:
        return 130
    except (BenchmarkError, LoraplexError, ServerSideError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 1
    _report(args, about, findings)
    return 0 if all(check.passed for check in findings.checks) else 1


def progress(text: str) -> None:
    """A line on stderr for whoever waits."""
    sys.stderr.write(f"{text}\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rules = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


@contextmanager
def ending_children() -> Iterator[None]:
    """Signals to end leave by the way on which children are ended."""
    before = {
        each: signal.signal(each, _exit_on_signal) for each in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _exit_on_signal(received: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + received)


def _report(args: argparse.Namespace, about: Mapping[str, Any], findings: Findings) -> None:
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("out", "save", "model")
    }
    settings["model"] = Path(args.model).name
    verdicts = "\n".join(f"    {check}" for check in findings.checks)
    text = f"{findings.table}\n\n{verdicts}\n\n{_conditions(about, settings)}\n"
    sys.stdout.write(text)
    record = {
        "environment": about,
        "settings": settings,
        "results": findings.figures,
        "checks": [{**asdict(check), "passed": check.passed} for check in findings.checks],
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{args.save}.json"
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(text, encoding="utf-8")


def _conditions(about: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return (
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} torch threads; clients "
        f"on the same machine. {in_words(about)}\n`{about['command']}`"
    )
