"""The command line of serving.py."""

import argparse
from pathlib import Path

from command import add_server_options, number
from peers.pipe import PEERS

DESCRIPTION = """\
Tokens a second and time to first token, with many adapters in one batch, beside PEFT.

Loraplex is a real server process behind gRPC sockets; transformers + PEFT runs in a process of its
own. They take turns on the same prompts, and one is idle while the other works.
"""

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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serving.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_load_options(parser)
    _add_system_options(parser)
    _add_result_options(parser)
    return parser


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--batches",
        type=_positives,
        default="1,8,32",
        metavar="N,N,...",
        help="requests at once (default: %(default)s)",
    )
    group.add_argument(
        "--adapters",
        type=_counts,
        default="0,1,8,16",
        metavar="N,N,...",
        help="distinct adapters in a batch, 0 for the bare base; left out where there are fewer "
        "requests (default: %(default)s)",
    )
    number(group, "--prompt-tokens", 64, "tokens in each prompt")
    number(group, "--max-tokens", 64, "tokens out of each request")
    number(group, "--rank", 16, "of the adapters, which are on all seven linears")
    number(group, "--repeats", 3, "waves of each kind")
    number(group, "--peer-repeats", 2, "of these, how many the peer runs too, in turn")
    number(group, "--seed", 1, "of prompts and adapters")


def _add_system_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who is asked")
    add_server_options(group)
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
        "peer's alone; what is uploaded to it is deleted at the end",
    )


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the figures go, besides stdout")
    group.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    group.add_argument(
        "--save", metavar="NAME", help="benchmarks/results/NAME.json, and the table as NAME.md"
    )


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
