"""The command line of serving.py."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from command import add_server_options, number
from lengths import parse_lengths
from measures import SLO_KEYS
from popularity import Popularity
from workload import PrefixScope

DESCRIPTION = """\
A load on a running server, or on one of the benchmark's own: requests for many adapters, sent when
they are due (an open loop, --request-rate) or when a client is free (a closed one, --concurrency).
Measured are throughput, latencies, goodput, errors, and what each adapter got.
"""

EPILOG = """\
Prompts are random tokens; every answer is greedy and exactly as long as it is asked to be.

lengths     64                             always
            16:256                         anything between, both included
            lognormal:128:0.8              mean, and deviation of the logarithm
            lognormal:128:0.8:4:1024       the same, bounded

popularity  uniform, round-robin, identical
            distinct                       every request its own adapter
            zipf:1.0                       the n-th adapter n^1.0 times rarer than the first
            power-law:0.3                  S-LoRA's traces; the smaller, the more skewed
            weights:10,1,1,1               shares, one for each adapter

latencies   count from the moment at which a request is due in an open loop, so that neither a slow
            server nor a slow client can hide; from sending it in a closed one
            TTFT first token, TPOT mean of the tokens after it, ITL pauses between arrivals,
            E2E end of the stream; queue and adapter wait are the server's own word

examples:
  a server of its own, 8 clients, 8 made-up adapters:
    python benchmarks/serving.py --concurrency 8 --num-adapters 8
  a server that runs, 4 requests a second for 32 adapters, how many in time:
    python benchmarks/serving.py --server 127.0.0.1:50051 --request-rate 4 --num-adapters 32 \\
        --popularity zipf:1.0 --slo ttft=500,tpot=50
  adapters that it has:
    python benchmarks/serving.py --server HOST:PORT --adapter support-de --adapter support-fr
  one adapter that floods, of eight; for a minute:
    python benchmarks/serving.py --request-rate 6 --num-adapters 8 \\
        --popularity weights:10,1,1,1,1,1,1,1 --num-requests 1000 --duration 60
  write the workload down, and send the same again, twice as fast:
    python benchmarks/serving.py --request-rate 4 --num-adapters 8 --write-trace load.jsonl
    python benchmarks/serving.py --trace load.jsonl --trace-speed 2
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serving.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_server(parser.add_argument_group("who is asked"))
    _add_pace(parser.add_argument_group("when"))
    _add_adapters(parser.add_argument_group("for which adapters"))
    _add_requests(parser.add_argument_group("what"))
    _add_trace(parser.add_argument_group("traces, one JSON object a line"))
    _add_results(parser.add_argument_group("figures"))
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with 2 where options do not fit together."""
    if args.trace is None and args.trace_speed != 1:
        parser.error("--trace-speed needs --trace")
    if args.trace is not None and (args.num_adapters or args.adapter):
        parser.error("--trace names its adapters itself: leave out --num-adapters and --adapter")
    if args.popularity.kind != "uniform" and not (args.adapter or args.num_adapters):
        parser.error("--popularity is among adapters: give --num-adapters or --adapter")
    if args.adapter and args.num_adapters:
        parser.error("either adapters that are there (--adapter) or made-up ones (--num-adapters)")
    names = len(args.adapter) or args.num_adapters
    if args.popularity.kind == "distinct" and 0 < names < args.num_requests:
        parser.error(f"distinct: {args.num_requests} requests need as many adapters, not {names}")
    weights = args.popularity.parameters
    if args.popularity.kind == "weights" and args.trace is None and len(weights) != names:
        parser.error(f"weights: {len(weights)} of them for {names} adapters")
    if args.server is None and (args.adapter or args.tls or args.tls_ca):
        parser.error("--adapter, --tls and --tls-ca are for a --server that runs already")
    for flag, path in (("--out", args.out), ("--write-trace", args.write_trace)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{flag}: there is no folder {path.parent}")
    if args.save is not None and Path(args.save).name != args.save:
        parser.error("--save takes a name; --out takes a path")
    if args.plot and args.out is None and args.save is None:
        parser.error("--plot needs --out or --save, beside which it lies")


def is_open(args: argparse.Namespace) -> bool:
    """Whether requests have a time at which they are due."""
    return args.trace is not None or math.isfinite(args.request_rate) or args.concurrency is None


_T = TypeVar("_T")


def _parsed(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """With the words of its ValueError for argparse."""

    def wrapped(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _seconds(text: str) -> float:
    value = _above_zero(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _ranks(text: str) -> list[int]:
    ranks = [_count(part) for part in text.split(",")]
    if 0 in ranks:
        raise argparse.ArgumentTypeError("a rank is at least 1")
    return ranks


def _objectives(text: str) -> dict[str, float]:
    """`ttft=500,tpot=50` as milliseconds by name."""
    objectives: dict[str, float] = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        if name not in SLO_KEYS or name in objectives:
            known = ", ".join(f"{key}=MS" for key in SLO_KEYS)
            raise argparse.ArgumentTypeError(f"{part!r}: objectives are {known}, each once")
        objectives[name] = _above_zero(limit)
    return objectives


def _add_server(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        help="one that runs already (default: one of the benchmark's own); adapters that are "
        "uploaded to it are deleted at the end",
    )
    group.add_argument("--token", metavar="TOKEN", help="sent as a bearer token")
    group.add_argument("--tls", action="store_true", help="connect with TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="TLS, trusting the roots of this PEM file")
    add_server_options(group)
    group.add_argument(
        "--serve-args",
        default="",
        metavar="'ARGS'",
        help="further arguments of its own server, such as '--memory 256M'; for a --server, "
        "--model only says which shapes made-up adapters have",
    )


def _add_pace(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--request-rate",
        type=_above_zero,
        default=math.inf,
        metavar="R",
        help="requests due a second (default: inf, everything at once)",
    )
    group.add_argument(
        "--burstiness",
        type=_above_zero,
        default=1.0,
        metavar="B",
        help="shape of the Gamma distributed gaps: 1 is Poisson, less comes in bursts, inf is "
        "evenly spaced (default: %(default)g)",
    )
    group.add_argument(
        "--concurrency",
        type=_parsed(_positive),
        metavar="N",
        help="clients, each of which sends its next request when the last one is answered; with "
        "--request-rate or --trace, the most that run at one time: what waits for a place waits "
        "in its latency",
    )
    group.add_argument(
        "--duration",
        type=_seconds,
        metavar="SECONDS",
        help="cut each run after so long, and leave what is running",
    )
    group.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="each request's deadline (default: none)",
    )


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise ValueError(f"{text!r} is not a positive number")
    return int(text)


def _add_adapters(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--num-adapters",
        type=_count,
        default=0,
        metavar="N",
        help="make up so many, and upload them (default: 0, the bare base)",
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="one that the server has (repeatable)",
    )
    group.add_argument(
        "--popularity",
        type=_parsed(Popularity.parse),
        default=Popularity("uniform"),
        metavar="KIND",
        help="see below (default: %(default)s)",
    )
    group.add_argument(
        "--rank",
        type=_ranks,
        default=[16],
        metavar="N[,N...]",
        help="of made-up adapters, in turn; they are on all seven linears (default: 16)",
    )


def _add_requests(group: "argparse._ArgumentGroup") -> None:
    number(group, "--num-requests", 64, "in each run; a trace has as many as its lines")
    for flag, what in (("--prompt-tokens", "of each prompt"), ("--max-tokens", "of each answer")):
        group.add_argument(
            flag,
            type=_parsed(parse_lengths),
            default="64",
            metavar="LENGTHS",
            help=f"tokens {what}; see below (default: %(default)s)",
        )
    group.add_argument(
        "--shared-prefix",
        type=_count,
        default=0,
        metavar="N",
        help="further tokens that prompts begin with, for the prefix cache (default: 0)",
    )
    group.add_argument(
        "--prefix-scope",
        type=PrefixScope,
        choices=list(PrefixScope),
        default=PrefixScope.ADAPTER,
        help="who shares them: the requests of one adapter, or all (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy"
    )
    group.add_argument(
        "--warmup",
        type=_count,
        default=0,
        metavar="N",
        help="requests ahead of the first run that do not count (default: 0)",
    )
    number(group, "--repeats", 1, "runs, of which medians are shown; only prompts differ")
    group.add_argument("--seed", type=int, default=1, metavar="N", help="default: %(default)s")


def _add_trace(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="send these requests instead: timestamp (seconds), adapter, prompt_tokens or "
        "token_ids, max_tokens, priority; adapters that the server lacks are made up",
    )
    group.add_argument(
        "--trace-speed", type=_seconds, default=1.0, metavar="X", help="X times as fast"
    )
    group.add_argument(
        "--write-trace", type=Path, metavar="FILE", help="write the first run's requests down"
    )


def _add_results(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--slo",
        type=_objectives,
        default={},
        metavar="ttft=MS,tpot=MS,e2el=MS",
        help="objectives of a request, for the goodput: any of these",
    )
    group.add_argument("--label", metavar="TEXT", help="written into the JSON")
    group.add_argument("--out", type=Path, metavar="FILE", help="JSON, besides stdout")
    group.add_argument(
        "--save", metavar="NAME", help="benchmarks/results/NAME.json, NAME.md and NAME.png"
    )
    group.add_argument(
        "--detailed", action="store_true", help="every request's latencies into the JSON, too"
    )
    group.add_argument(
        "--plot",
        action=argparse.BooleanOptionalAction,
        help="latencies, throughput over time and service by adapter as a PNG (default: with "
        "--save, where matplotlib is installed)",
    )
