"""Tokens a second and time to first token, with many adapters in one batch, beside PEFT.

Loraplex is a real server process behind gRPC sockets; transformers + PEFT runs in a process of its
own. They take turns on the same prompts, and one is idle while the other works.
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from child import BENCHMARKS, BenchmarkError, Child
from environment import cores, environment
from figures import Summary, Timeline, num_tokens
from loraplex.config import DEFAULT_MODEL, cache_dir
from loraplex.errors import LoraplexError as ServerSideError
from loraplex_client import LoraplexError
from peers.loraplex_grpc import Loraplex, address, check_limits, serve_command
from peers.pipe import PEERS, Peer, PeerSettings, PipedPeer
from report import OURS, TITLES, Results, as_json, markdown
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from workload import Shape, Wave, Workload, shapes

RESULTS = BENCHMARKS / "results"
WARM_UP_TOKENS = 4

EPILOG = """\
decode tok/s  while every request of the wave decodes: after the last one's first token, before the
              first one's last
TTFT          from sending the wave to a request's first token: median and 90th percentile
end-to-end    every token, from sending the wave to its last token, prefill included

examples:
  python benchmarks/serving.py --batches 8 --adapters 0,8 --repeats 1 --peers none
  python benchmarks/serving.py --repeats 5 --peer-repeats 5 --save two-cores
  python benchmarks/serving.py --server 10.0.0.7:50051 --peers none
"""


@dataclass(frozen=True, slots=True)
class System:
    """One of those that take turns."""

    name: str
    peer: Peer
    repeats: int


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for usage, 130 after Ctrl-C, 1 for everything else."""
    args = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "benchmarks/serving.py", *arguments])
    try:
        _benchmark(args, command)
    except KeyboardInterrupt:
        return 130
    except (BenchmarkError, LoraplexError, ServerSideError) as error:
        sys.stderr.write(f"serving.py: {error}\n")
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="serving.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = parser.add_argument_group("what is asked")
    listing = "comma-separated (default: %(default)s)"
    load.add_argument(
        "--batches", type=_positives, default="1,8,32", help=f"requests at once, {listing}"
    )
    load.add_argument(
        "--adapters",
        type=_counts,
        default="0,1,8,16",
        help="distinct adapters in a batch, 0 for the bare base, never more than requests, "
        + listing,
    )

    def number(flag: str, default: int, what: str) -> None:
        help_ = f"{what} (default: %(default)s)"
        load.add_argument(flag, type=_positive, default=default, metavar="N", help=help_)

    number("--prompt-tokens", 64, "tokens in each prompt")
    number("--max-tokens", 64, "tokens out of each request")
    number("--rank", 16, "of the adapters, which are on all seven linears")
    number("--repeats", 3, "waves of each kind")
    number("--peer-repeats", 2, "of them with the peer's turn after Loraplex's")
    number("--seed", 1, "of prompts and adapters")
    _add_system_options(parser)
    return parser


def _add_system_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who is asked")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH|HUB_ID|NAME",
        help="a full-precision checkpoint; both round its linears to NF4 (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s"
    )
    group.add_argument(
        "--threads", type=_positive, default=cores(), metavar="N", help="default: one a core"
    )
    group.add_argument(
        "--peers",
        choices=("none", *PEERS),
        default="peft",
        help="peft is transformers + PEFT's adapter_names (default: %(default)s)",
    )
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="a server that runs already, with this --model: --dtype and --threads are then the "
        "peer's alone; its adapters are deleted at the end",
    )
    results = parser.add_argument_group("where the figures go, besides stdout")
    results.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    results.add_argument(
        "--save", metavar="NAME", help="benchmarks/results/NAME.json, and the table as NAME.md"
    )


def _benchmark(args: argparse.Namespace, command: str) -> None:
    wanted = shapes(args.batches, args.adapters)
    if not wanted:
        raise BenchmarkError("no batch has as many requests as adapters")
    from loraplex.model.hub import resolve_model  # imports torch, which --help need not wait for

    before = environment()
    model = resolve_model(args.model, cache_dir()).resolve()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work, ExitStack() as stack:
        adapters = _write_adapters(args, model, Path(work) / "adapters", wanted)
        systems, vocab_size = _start(args, model, adapters, wanted, Path(work), stack)
        workload = Workload(
            tuple(adapters), vocab_size, args.prompt_tokens, args.max_tokens, args.seed
        )
        results = _measure(systems, workload, wanted)
    table = markdown(results)
    sys.stdout.write(table + "\n")
    _save(args, {"command": command, **before}, results, table)


def _write_adapters(
    args: argparse.Namespace, model: Path, folder: Path, wanted: Sequence[Shape]
) -> dict[str, Path]:
    """As many as the largest batch needs, by the names they are uploaded under."""
    from adapter_files import write_adapter
    from loraplex.model.config import read_model_config

    linears = list(read_model_config(model).linears())
    adapters = {}
    for index in range(max(shape.num_adapters for shape in wanted)):
        name = f"bench-r{args.rank}-s{args.seed}-{index:02}"
        adapters[name] = folder / name
        write_adapter(adapters[name], linears, args.rank, seed=args.seed * 1000 + index)
    return adapters


def _start(
    args: argparse.Namespace,
    model: Path,
    adapters: Mapping[str, Path],
    wanted: Sequence[Shape],
    work: Path,
    stack: ExitStack,
) -> tuple[list[System], int]:
    """All that take turns, loaded and given the adapters; and the model's vocabulary."""
    largest = max(shape.batch for shape in wanted)
    target = args.server
    if target is None:
        serve = serve_command(
            model=str(model),
            dtype=args.dtype,
            threads=args.threads,
            max_running=max(largest, 64),
            store=work / "store",
        )
        target = address(stack.enter_context(Child("the server", serve, work / "server.log")))
    loraplex = stack.enter_context(Loraplex(target))
    info = loraplex.info()
    check_limits(info, batch=largest, rank=args.rank)
    loraplex.upload(adapters)
    systems = [System(OURS, loraplex, args.repeats)]
    if args.peers != "none":
        child = Child(TITLES[args.peers], [PEERS[args.peers]], work / "peer.log")
        peer = PipedPeer(stack.enter_context(child))
        folders = {name: str(folder) for name, folder in adapters.items()}
        peer.load(PeerSettings(str(model), folders, args.dtype, args.threads))
        systems.append(System(args.peers, peer, min(args.peer_repeats, args.repeats)))
    return systems, info.vocab_size


def _measure(systems: Sequence[System], workload: Workload, wanted: Sequence[Shape]) -> Results:
    """Loraplex, peer, Loraplex, ...: a drift of the machine's speed reaches all of them.

    The shapes of one batch take turns too, so that "of own base" compares neighbours.
    """
    waves: dict[Shape, dict[str, list[list[Timeline]]]] = {
        shape: defaultdict(list) for shape in wanted
    }
    batches = sorted({shape.batch for shape in wanted})
    with _progress(systems, workload, wanted) as advance:
        for batch in batches:
            of_batch = [shape for shape in wanted if shape.batch == batch]
            for shape in of_batch:
                _warm_up(systems, workload.wave(shape, -1))
            for repeat in range(max(system.repeats for system in systems)):
                for shape in of_batch:
                    for system in systems:
                        if repeat < system.repeats:
                            wave = workload.wave(shape, repeat)
                            waves[shape][system.name].append(_run(system, wave))
                            advance(f"{shape}: {TITLES[system.name]}", wave.num_tokens)
    return {
        shape: {name: Summary.of(repeats) for name, repeats in by_system.items()}
        for shape, by_system in waves.items()
    }


def _warm_up(systems: Sequence[System], wave: Wave) -> None:
    """A few tokens: adapters become resident, libraries choose their kernels."""
    for system in systems:
        system.peer.run(replace(wave, max_tokens=WARM_UP_TOKENS))


def _run(system: System, wave: Wave) -> list[Timeline]:
    timelines = system.peer.run(wave)
    counts = {num_tokens(timeline) for timeline in timelines}
    if len(timelines) != len(wave.prompts) or counts != {wave.max_tokens}:
        raise BenchmarkError(
            f"{TITLES[system.name]} answered {len(timelines)} requests with {sorted(counts)} "
            f"tokens, not {len(wave.prompts)} with {wave.max_tokens}"
        )
    return timelines


@contextmanager
def _progress(
    systems: Sequence[System], workload: Workload, wanted: Sequence[Shape]
) -> Iterator["_Advance"]:
    """A bar of tokens on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        repeats = sum(system.repeats for system in systems)
        total = sum(shape.batch for shape in wanted) * workload.max_tokens * repeats
        yield _Advance(progress, total)


class _Advance:
    """Called after each wave, with what it was."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("warming up", total=total)

    def __call__(self, done: str, num_tokens: int) -> None:
        self._progress.update(self._task, advance=num_tokens, description=f"done: {done}")


def _save(
    args: argparse.Namespace, about: Mapping[str, object], results: Results, table: str
) -> None:
    options = ("prompt_tokens", "max_tokens", "rank", "repeats", "peer_repeats", "seed", "dtype")
    settings = {
        **{option: getattr(args, option) for option in options},
        "model": Path(args.model).name,
        "threads": args.threads,
        "own_server": args.server is None,
    }
    record = {"environment": about, "settings": settings, "results": as_json(results)}
    text = json.dumps(record, indent=2) + "\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.json").write_text(text, encoding="utf-8")
        (RESULTS / f"{args.save}.md").write_text(table + "\n", encoding="utf-8")


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,8,32")
    return [int(part) for part in parts]


def _positives(text: str) -> list[int]:
    numbers = _counts(text)
    if 0 in numbers:
        raise argparse.ArgumentTypeError("a batch has at least one request")
    return numbers


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """So that children are ended on the way out."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
