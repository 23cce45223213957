"""Tokens a second and time to first token, with many adapters in one batch, beside PEFT.

python benchmarks/serving.py --help
"""

import argparse
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from child import BENCHMARKS, BenchmarkError, Child
from environment import environment
from loraplex.config import cache_dir
from loraplex.errors import LoraplexError as ServerSideError
from loraplex_client import LoraplexError
from options import build_parser
from peers.loraplex_grpc import Loraplex, address, check_limits, serve_command
from peers.pipe import PEERS, PeerSettings, PipedPeer
from report import OURS, TITLES, as_json, conditions, markdown
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from turns import Done, System, Turn, measure, turns
from workload import Shape, Workload, shapes

RESULTS = BENCHMARKS / "results"


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, 2 for usage, 130 after Ctrl-C, 1 for everything else."""
    args = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        _benchmark(args, shlex.join(["python", "benchmarks/serving.py", *argv]))
    except KeyboardInterrupt:
        return 130
    except (BenchmarkError, LoraplexError, ServerSideError, OSError) as error:
        sys.stderr.write(f"serving.py: {error}\n")
        return 1
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    """So that children are ended on the way out."""
    raise SystemExit(128 + number)


def _benchmark(args: argparse.Namespace, command: str) -> None:
    from loraplex.model.hub import resolve_model  # imports torch, which --help need not wait for

    wanted = shapes(args.batches, args.adapters)
    if not wanted:
        raise BenchmarkError("no batch has as many requests as adapters")
    about = {"command": command, **environment()}
    model = resolve_model(args.model, cache_dir()).resolve()
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work, ExitStack() as stack:
        adapters = _write_adapters(args, model, Path(work) / "adapters", wanted)
        loraplex = _start_loraplex(args, model, adapters, wanted, Path(work), stack)
        systems = [System(OURS, loraplex, args.repeats)]
        if args.peers != "none":
            peer = _start_peer(args, model, adapters, Path(work), stack)
            systems.append(System(args.peers, peer, min(args.peer_repeats, args.repeats)))
        vocab_size = loraplex.info().vocab_size
        workload = Workload(
            tuple(adapters), vocab_size, args.prompt_tokens, args.max_tokens, args.seed
        )
        with _progress(wanted, systems) as done:
            results = measure(systems, workload, wanted, done)
    settings = _settings(args)
    table = f"{markdown(results)}\n\n{conditions(about, settings)}\n"
    sys.stdout.write(table)
    record = {"environment": about, "settings": settings, "results": as_json(results)}
    _save(args, json.dumps(record, indent=2) + "\n", table)


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


def _start_loraplex(
    args: argparse.Namespace,
    model: Path,
    adapters: Mapping[str, Path],
    wanted: Sequence[Shape],
    work: Path,
    stack: ExitStack,
) -> Loraplex:
    """Connected, with the adapters uploaded; the server is one of our own unless one was named."""
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
    check_limits(loraplex.info(), batch=largest, rank=args.rank)
    loraplex.upload(adapters)
    return loraplex


def _start_peer(
    args: argparse.Namespace,
    model: Path,
    adapters: Mapping[str, Path],
    work: Path,
    stack: ExitStack,
) -> PipedPeer:
    child = Child(TITLES[args.peers], [PEERS[args.peers]], work / "peer.log")
    peer = PipedPeer(stack.enter_context(child))
    folders = {name: str(folder) for name, folder in adapters.items()}
    peer.load(PeerSettings(str(model), folders, args.dtype, args.threads))
    return peer


@contextmanager
def _progress(wanted: Sequence[Shape], systems: Sequence[System]) -> Iterator[Done]:
    """A bar of turns on a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = sum(1 for _ in turns(wanted, {system.name: system.repeats for system in systems}))
        task = progress.add_task("starting", total=total)

        def done(turn: Turn) -> None:
            kind = "warm-up" if turn.repeat is None else f"repeat {turn.repeat + 1}"
            what = f"{turn.shape}: {TITLES[turn.system]}, {kind}"
            progress.update(task, advance=1, description=what)

        yield done


def _settings(args: argparse.Namespace) -> dict[str, object]:
    options = ("prompt_tokens", "max_tokens", "rank", "repeats", "peer_repeats", "seed", "dtype")
    return {
        **{option: getattr(args, option) for option in options},
        "model": Path(args.model).name,
        "threads": args.threads,
        "own_server": args.server is None,
    }


def _save(args: argparse.Namespace, record: str, table: str) -> None:
    if args.out is not None:
        args.out.write_text(record, encoding="utf-8")
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.json").write_text(record, encoding="utf-8")
        (RESULTS / f"{args.save}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
