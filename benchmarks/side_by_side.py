"""Tokens a second, time to first token and memory beside vLLM, llama.cpp, PEFT and polylora.

python benchmarks/side_by_side.py --help
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapter_files import linears_of, write_adapter
from agreement import Agreement, Said, agreements, ask
from child import BenchmarkError, Child
from command import Findings, progress, run_command
from loraplex.config import cache_dir
from peers.catalog import OURS, PEERS, TITLES, Kind, Starting
from peers.environments import Environment
from peers.loraplex_grpc import Loraplex, address, check_limits, serve_command
from peers.pipe import PeerSettings
from processes import Memory, memory, tree, wait_until_idle
from report import as_json, rates, sizes, tokens
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from side_by_side_options import build_parser
from turns import SECONDS_TO_COME_TO_REST, Done, Measured, Measurement, System, Turn, turns
from verdicts import checks
from waves import Shape, Workload, shapes

MARGIN = 16
"""Tokens of context that a peer gets beyond what a request takes."""


def main(argv: Sequence[str]) -> int:
    return run_command(build_parser(quick="--quick" in argv), benchmark, argv)


def benchmark(args: argparse.Namespace) -> Findings:
    from loraplex.model.hub import resolve_model  # imports torch, which --help need not wait for

    wanted = shapes(args.batches, args.adapters)
    if not wanted:
        raise BenchmarkError("no batch has as many requests as adapters")
    model = resolve_model(args.model, cache_dir()).resolve()
    remarks: list[str] = []
    kinds = {name: PEERS[name] for name in args.peers}
    environments = installed(kinds, cache_dir() / "peers", remarks)
    with tempfile.TemporaryDirectory(prefix="loraplex-side-") as work, ExitStack() as stack:
        adapters = _write_adapters(args, model, Path(work) / "adapters", wanted)
        loraplex = _start_loraplex(args, model, adapters, wanted, Path(work), stack)
        settings = _settings(args, model, adapters, wanted)
        peers = _start_peers(environments, settings, Path(work), stack, remarks)
        systems = _systems(args, loraplex, peers)
        workload = _workload(args, adapters, loraplex.info().vocab_size)
        remarks += _restless(systems)
        said = _ask_all(systems, workload)
        with _bar(wanted, systems) as done:
            measured = Measurement(workload, wanted, systems).run(done)
        taken = {each.name: _memory(each) for each in systems if each.peer.pid is not None}
    return _findings(measured, taken, said, remarks)


def installed(kinds: Mapping[str, Kind], cache: Path, remarks: list[str]) -> dict[str, Environment]:
    """The environments of the peers that can be installed; a remark for each that cannot."""
    found = {}
    for name, kind in kinds.items():
        try:
            with _installing(kind.title) as told:
                found[name] = kind.prepare(cache, told)
        except BenchmarkError as error:
            _remark(remarks, f"{kind.title} is left out: {error}")
    return found


def _start_peers(
    environments: Mapping[str, Environment],
    settings: PeerSettings,
    work: Path,
    stack: ExitStack,
    remarks: list[str],
) -> dict[str, Starting]:
    """All load at once; a remark for each that ends instead."""
    starting: dict[str, Starting] = {}
    for name, environment in environments.items():
        folder = work / name
        folder.mkdir()
        own = _with_precision(settings, PEERS[name].precision)
        try:
            starting[name] = PEERS[name].start(environment, own, folder, stack)
        except BenchmarkError as error:
            _remark(remarks, f"{TITLES[name]} is left out: {error}")
    ready = {}
    for name, peer in starting.items():
        progress(f"waiting for {TITLES[name]}")
        try:
            peer.wait_until_ready()
            ready[name] = peer
        except BenchmarkError as error:
            _remark(remarks, f"{TITLES[name]} is left out: {error}")
    return ready


def _with_precision(settings: PeerSettings, precision: str) -> PeerSettings:
    return PeerSettings(**{**asdict(settings), "precision": precision})


def _settings(
    args: argparse.Namespace, model: Path, adapters: Mapping[str, Path], wanted: Sequence[Shape]
) -> PeerSettings:
    return PeerSettings(
        model=str(model),
        adapters={name: str(folder) for name, folder in adapters.items()},
        rank=args.rank,
        threads=args.threads,
        max_batch=max(shape.batch for shape in wanted),
        max_context=args.prompt_tokens + args.max_tokens + MARGIN,
        precision="bf16",
    )


def _write_adapters(
    args: argparse.Namespace, model: Path, folder: Path, wanted: Sequence[Shape]
) -> dict[str, Path]:
    """As many as the largest batch needs, by the names that every system knows them by."""
    adapters = {}
    for index in range(max(shape.num_adapters for shape in wanted)):
        name = f"bench-r{args.rank}-s{args.seed}-{index:02}"
        adapters[name] = folder / name
        write_adapter(adapters[name], linears_of(model), args.rank, args.seed * 1000 + index)
    return adapters


def _start_loraplex(
    args: argparse.Namespace,
    model: Path,
    adapters: Mapping[str, Path],
    wanted: Sequence[Shape],
    work: Path,
    stack: ExitStack,
) -> Loraplex:
    """Connected, with the adapters uploaded."""
    largest = max(shape.batch for shape in wanted)
    serve = serve_command(
        model=str(model),
        dtype=args.dtype,
        threads=args.threads,
        max_running=max(largest, 64),
        store=work / "store",
        speculation="off",  # of which the peers have none, or have it off
    )
    server = stack.enter_context(Child("the server", serve, work / "server.log"))
    loraplex = stack.enter_context(Loraplex(address(server), server.pid))
    check_limits(loraplex.info(), batch=largest, rank=args.rank)
    loraplex.upload(adapters)
    return loraplex


def _systems(
    args: argparse.Namespace, loraplex: Loraplex, peers: Mapping[str, Starting]
) -> list[System]:
    """Loraplex first: it may not fail."""
    repeats = min(args.peer_repeats, args.repeats)
    others = [
        System(name, peer, repeats, mixes=PEERS[name].mixes, patience=args.patience)
        for name, peer in peers.items()
    ]
    return [System(OURS, loraplex, args.repeats), *others]


def _workload(args: argparse.Namespace, adapters: Mapping[str, Path], vocab_size: int) -> Workload:
    return Workload(
        adapters=tuple(adapters),
        vocab_size=vocab_size,
        prompt_tokens=args.prompt_tokens,
        max_tokens=args.max_tokens,
        seconds=float(args.wave_seconds),
        seed=args.seed,
    )


def _restless(systems: Sequence[System]) -> Iterator[str]:
    """A remark for each system that uses the CPU while nobody asks it anything."""
    for each in systems:
        pid = each.peer.pid
        if pid is not None and not wait_until_idle(pid, SECONDS_TO_COME_TO_REST):
            yield f"{TITLES[each.name]} is never idle: it takes from everyone's turns"


def _ask_all(systems: Sequence[System], workload: Workload) -> dict[str, Said]:
    said = {}
    for each in systems:
        progress(f"comparing the tokens of {TITLES[each.name]}")
        said[each.name] = ask(each, workload)
    return said


def _memory(system: System) -> Memory:
    assert system.peer.pid is not None
    return memory(tree(system.peer.pid))


def _findings(
    measured: Measured, taken: Mapping[str, Memory], said: Mapping[str, Said], remarks: list[str]
) -> Findings:
    references = [name for name in ("peft", "peft-nf4") if name in said]
    found = agreements(said, references or [OURS])
    ignoring = [name for name, each in found.items() if each.ignores_adapters]
    remarks = [*remarks, *measured.remarks]
    versions = (f"{TITLES[name]}: {text}" for name, text in _versions(taken).items())
    parts = [rates(measured.results), sizes(taken), tokens(found), "\n".join(remarks)]
    parts.append("; ".join(versions))
    return Findings(
        table="\n\n".join(part for part in parts if part),
        figures=_figures(measured, taken, found, remarks),
        checks=list(checks(measured.results, ignoring)),
    )


def _figures(
    measured: Measured,
    taken: Mapping[str, Memory],
    found: Mapping[str, Agreement],
    remarks: Sequence[str],
) -> dict[str, Any]:
    return {
        "shapes": as_json(measured.results),
        "memory_mb": {name: asdict(each) for name, each in taken.items()},
        "leading_tokens": {name: asdict(each) for name, each in found.items()},
        "versions": _versions(taken),
        "remarks": list(remarks),
    }


def _versions(names: Iterable[str]) -> dict[str, str]:
    return {name: PEERS[name].versions() for name in names if name in PEERS}


def _remark(remarks: list[str], text: str) -> None:
    """For the report, and at once for whoever waits."""
    remarks.append(text)
    progress(text)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """On a terminal, nothing in a pipe."""
    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def _installing(title: str) -> Iterator[Any]:
    """A bar that shows up with the first stage; in a pipe a line a stage."""
    with _progress_bar() as bar:
        task = None
        stages: set[str] = set()

        def told(stage: str, done: int, total: int) -> None:
            nonlocal task
            task = bar.add_task(title) if task is None else task
            bar.update(task, description=f"{title}: {stage}", completed=done, total=total or None)
            if bar.disable and stage not in stages:
                progress(f"{title}: {stage}")
            stages.add(stage)

        yield told


@contextmanager
def _bar(wanted: Sequence[Shape], systems: Sequence[System]) -> Iterator[Done]:
    with _progress_bar() as bar:
        task = bar.add_task("starting", total=sum(1 for _ in turns(wanted, systems)))

        def done(turn: Turn) -> None:
            kind = "warm-up" if turn.repeat is None else f"repeat {turn.repeat + 1}"
            what = f"{turn.shape}: {TITLES[turn.system.name]}, {kind}"
            bar.update(task, advance=1, description=what)

        yield done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
