"""From serving.py's options to a server, adapters on it, runs against it, and what is said."""

import argparse
import asyncio
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import plots
from child import BenchmarkError, Child
from command import RESULTS, progress
from environment import environment
from load import Load, Pace, Run
from loraplex.progress import progress_bar
from loraplex_client import AsyncClient, LoraplexError, ServerInfo
from made_up import MadeUp, missing, names_of
from outcome import Asking
from serving_options import is_open
from serving_report import Report, as_json, markdown
from trace_file import TraceLine, read_trace, write_trace
from workload import Prefix, Request, Traffic, as_trace, replayed


def measure(args: argparse.Namespace, command: str) -> int:
    """Everything; the exit code."""
    if args.plot:
        plots.require()
    lines = None if args.trace is None else read_trace(args.trace)
    about = {"command": command, **environment()}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as work, ExitStack() as stack:
        target = args.server or stack.enter_context(_own_server(args, Path(work)))
        session = stack.enter_context(connected(args, target, Path(work) / "adapters"))
        runs = session.runs(session.adapters(lines), lines)
        report = Report.of(runs, args.slo, _settings(args, session.info, runs[0], lines), about)
        _tell(args, report)
    if report.is_incomplete:
        return 130
    if not report.figures["completed"]:
        raise BenchmarkError("no request was answered")
    return 0


@contextmanager
def _own_server(args: argparse.Namespace, work: Path) -> Iterator[str]:
    """HOST:PORT of a server that ends with the benchmark."""
    progress("starting a server")
    from lifecycle import ServerSettings, model_folder  # imports torch
    from peers.loraplex_grpc import address

    settings = ServerSettings(
        model=str(model_folder(args.model)),
        dtype=args.dtype,
        threads=args.threads,
        max_running=max(args.concurrency or 0, 64),
    )
    command = [*settings.command(work / "store"), *shlex.split(args.serve_args)]
    with Child("the server", command, work / "server.log") as child:
        yield address(child)


@contextmanager
def connected(args: argparse.Namespace, target: str, work: Path) -> Iterator["Session"]:
    """Adapters that the session uploads are deleted when it is left."""

    async def connect() -> AsyncClient:  # inside the loop that uses it
        return AsyncClient(target, token=args.token, tls=args.tls_ca or args.tls)

    with asyncio.Runner() as runner:
        client = runner.run(connect())
        made_up = MadeUp(client, args.model, work)
        try:
            info = runner.run(client.server_info())
            yield Session(args, runner, client, made_up, info)
        finally:
            try:
                runner.run(made_up.delete())
            except LoraplexError as error:
                progress(f"serving.py: made-up adapters stay on the server: {error}")
            runner.run(client.close())


class Session:
    """One client on one server. Nothing in it changes but what `made_up` has uploaded."""

    def __init__(
        self,
        args: argparse.Namespace,
        runner: asyncio.Runner,
        client: AsyncClient,
        made_up: MadeUp,
        info: ServerInfo,
    ) -> None:
        self._args = args
        self._runner = runner
        self._client = client
        self._made_up = made_up
        self.info = info

    def adapters(self, lines: Sequence[TraceLine] | None) -> list[str]:
        """The names that requests ask for, all of them on the server now."""
        args = self._args
        if lines is None and not args.adapter:
            names = names_of(args.num_adapters, args.rank, args.seed)
            self._make_up(names)
            return names
        traced = {line.adapter for line in lines or () if line.adapter is not None}
        names = args.adapter or sorted(traced)
        absent = self._runner.run(missing(self._client, names))
        if args.adapter and absent:
            raise BenchmarkError(f"the server has no adapter {', '.join(absent)}")
        if absent:
            some = ", ".join(absent[:4]) + (", ..." if len(absent) > 4 else "")
            progress(f"making up {len(absent)} adapters that the server does not have: {some}")
            self._make_up(absent)
        return list(names)

    def _make_up(self, names: Sequence[str]) -> None:
        ranks = {name: self._args.rank[i % len(self._args.rank)] for i, name in enumerate(names)}
        most = self.info.limits.max_rank
        if any(rank > most for rank in ranks.values()):
            raise BenchmarkError(f"this server takes adapters of rank {most} at most")
        if names:
            with progress_bar("making up adapters") as report:
                self._runner.run(self._made_up.upload(ranks, self._args.seed, report))

    def runs(self, adapters: Sequence[str], lines: Sequence[TraceLine] | None) -> list[Run]:
        """At least one. Where Ctrl-C ends one, it is the last."""
        args = self._args
        if args.warmup:
            self._warm_up(self._requests(adapters, lines, "warm-up")[: args.warmup])
        runs: list[Run] = []
        while len(runs) < args.repeats and not any(run.is_interrupted for run in runs):
            requests = self._requests(adapters, lines, f"run {len(runs) + 1}")
            if args.write_trace is not None and not runs:
                write_trace(args.write_trace, as_trace(requests))
            runs.append(self._run(requests, f"run {len(runs) + 1} of {args.repeats}"))
        return runs

    def _requests(
        self, adapters: Sequence[str], lines: Sequence[TraceLine] | None, part: str
    ) -> list[Request]:
        args = self._args
        if lines is not None:
            requests = replayed(lines, args.trace_speed, self.info.vocab_size, args.seed, part)
        else:
            requests = Traffic(
                num_requests=args.num_requests,
                adapters=adapters,
                popularity=args.popularity,
                prompt=args.prompt_tokens,
                output=args.max_tokens,
                prefix=Prefix(args.shared_prefix, args.prefix_scope),
                rate=args.request_rate,
                burstiness=args.burstiness,
                vocab_size=self.info.vocab_size,
                seed=args.seed,
            ).requests(part)
        self._check(requests)
        return requests

    def _check(self, requests: Sequence[Request]) -> None:
        """BenchmarkError for what this server would refuse, every time."""
        longest = max(len(request.token_ids) + request.max_tokens for request in requests)
        if longest > self.info.context_length:
            raise BenchmarkError(
                f"a request of {longest} tokens, prompt and answer, does not fit into this "
                f"server's context of {self.info.context_length}"
            )
        if max(max(request.token_ids) for request in requests) >= self.info.vocab_size:
            raise BenchmarkError(f"the model has token ids below {self.info.vocab_size} only")

    def _warm_up(self, requests: Sequence[Request]) -> None:
        pace = Pace(is_open=False, concurrency=self._args.concurrency or 8)
        with progress_bar("warming up") as report:
            self._runner.run(Load(self._client, requests, pace, self._asking()).run(report))

    def _run(self, requests: Sequence[Request], title: str) -> Run:
        args = self._args
        pace = Pace(is_open(args), args.concurrency, args.duration)
        load = Load(self._client, requests, pace, self._asking())
        try:
            with progress_bar(title) as report:
                self._runner.run(load.run(report))
        except KeyboardInterrupt:
            return load.result(is_interrupted=True)
        return load.result()

    def _asking(self) -> Asking:
        return Asking(self._args.temperature, self._args.timeout)


def _settings(
    args: argparse.Namespace, info: ServerInfo, run: Run, lines: Sequence[TraceLine] | None
) -> dict[str, Any]:
    """What was asked of whom. Folders are left out: they name the machine."""
    options = ("burstiness", "concurrency", "duration", "timeout", "temperature", "warmup")
    made_up = ("num_adapters", "popularity", "rank", "prompt_tokens", "max_tokens", "shared_prefix")
    settings = {
        **{name: getattr(args, name) for name in (*options, "repeats", "seed", "label")},
        "request_rate": args.request_rate,
        "num_requests": run.num_requests,
        "served_model": info.model,
        "device": info.device,
        "quantization": info.quantization,
        "max_running": info.limits.max_running,
        "own_server": args.server is None,
        "serve_args": args.serve_args,
        "pace": _pace(args),
    }
    if lines is not None:
        span = (lines[-1].timestamp - lines[0].timestamp) / args.trace_speed
        settings["request_rate"] = len(lines) / span if span else math.inf
        return {**settings, "trace": args.trace.name, "trace_speed": args.trace_speed}
    named = {"adapter": args.adapter, "prefix_scope": args.prefix_scope}
    return {**settings, **named, **{name: getattr(args, name) for name in made_up}}


def _pace(args: argparse.Namespace) -> str:
    """In words."""
    if not is_open(args):
        return f"a closed loop of {args.concurrency} clients"
    most = f", at most {args.concurrency} at one time" if args.concurrency else ""
    if args.trace is not None:
        speed = "" if args.trace_speed == 1 else f" at {args.trace_speed:g} times its speed"
        return f"an open loop, the trace {args.trace.name}{speed}{most}"
    if math.isinf(args.request_rate):
        return "an open loop, all requests at once"
    gaps = {1.0: "Poisson arrivals", math.inf: "even arrivals"}
    kind = gaps.get(args.burstiness, f"Gamma arrivals of burstiness {args.burstiness:g}")
    return f"an open loop, {kind}, {args.request_rate:g} requests/s{most}"


def _tell(args: argparse.Namespace, report: Report) -> None:
    """On stdout, and in the files that were asked for."""
    text = markdown(report) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    record = json.dumps(as_json(report, args.detailed), indent=2) + "\n"
    paths = [] if args.out is None else [args.out]
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        paths.append(RESULTS / f"{args.save}.json")
        paths[-1].with_suffix(".md").write_text(text, encoding="utf-8")
    for path in paths:
        path.write_text(record, encoding="utf-8")
    if args.plot is False or (args.plot is None and args.save is None):
        return
    if not plots.can_plot():
        progress("serving.py: no plot: matplotlib is not installed")
        return
    for path in paths:
        plots.save(path.with_suffix(".png"), report.runs, report.title)
