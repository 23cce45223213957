"""The command line of side_by_side.py."""

import argparse
from collections.abc import Mapping

import command
from command import number, positive
from peers.catalog import PEERS

DESCRIPTION = """\
Tokens a second and time to first token beside others that serve LoRA adapters on a CPU.

Loraplex is a server process behind gRPC sockets. Each peer is a process of its own, in a virtual
environment of its own, which is made on first use under Loraplex's folder in the user's cache (some
minutes and 4 GB for all of them; llama.cpp is compiled). One that cannot be installed or started is
left out with a line. All take turns on the same prompts, each idle while another works.
"""

EPILOG = """\
peers
  vllm       vLLM's CPU wheel, bfloat16, LoRA off, compiled: asked for the bare base alone
  vllm-lora  the same with --enable-lora
  llama.cpp  its own server, Q4_1, the adapters in its own form
  peft       transformers + PEFT's adapter_names, bfloat16
  peft-nf4   the same over bitsandbytes' NF4
  polylora   its torch path over transformers, bfloat16

figures
  decode tok/s  while every request of a wave decodes: after the last one's first token, before the
                first one's last
  TTFT          from sending the wave to a request's first token: median and 90th percentile
  end-to-end    every token, from sending the wave to its last token, prefill included

examples:
  python benchmarks/side_by_side.py --quick
  python benchmarks/side_by_side.py --peers llama.cpp --batches 1 --adapters 0,1 --repeats 9
  python benchmarks/side_by_side.py --save side_by_side
"""

_DEFAULTS: Mapping[str, object] = {
    "batches": "1,8,32",
    "adapters": "0,1,8,16,32",
    "repeats": 3,
    "peer_repeats": 2,
    "wave_seconds": 30,
    "patience": 8,
}
_QUICK: Mapping[str, object] = {
    "adapters": "0,8",
    "repeats": 1,
    "peer_repeats": 1,
    "wave_seconds": 12,
}


def build_parser(*, quick: bool = False) -> argparse.ArgumentParser:
    """`quick`: with the defaults that `--quick` stands for."""
    parser = command.build_parser("side_by_side.py", DESCRIPTION, EPILOG)
    _add_load_options(parser)
    _add_turn_options(parser)
    defaults = {**_DEFAULTS, **_QUICK} if quick else _DEFAULTS
    parser.set_defaults(**defaults)
    return parser


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--batches", type=_positives, metavar="N,N,...", help="requests at once (default: 1,8,32)"
    )
    group.add_argument(
        "--adapters",
        type=_counts,
        metavar="N,N,...",
        help="distinct adapters in a batch, 0 for the bare base; left out where there are fewer "
        "requests (default: 0,1,8,16,32)",
    )
    number(group, "--prompt-tokens", 64, "tokens in each prompt")
    number(group, "--max-tokens", 64, "tokens out of each request")
    number(group, "--rank", 16, "of the adapters, which are on all seven linears")


def _add_turn_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who is asked, and how often")
    group.add_argument(
        "--peers",
        type=_peers,
        default=",".join(PEERS),
        metavar="LIST",
        help="of those below, in the order in which they take turns; none for Loraplex alone "
        "(default: all)",
    )
    for flag, what in (
        ("--repeats", "waves of each kind"),
        ("--peer-repeats", "of these, how many the peers run too, in turn"),
        ("--wave-seconds", "a wave is stopped after so long: its figures are of what came by then"),
        ("--patience", "seconds; a peer's wave that took longer is not repeated"),
    ):
        group.add_argument(flag, type=positive, metavar="N", help=f"{what} (default: %(default)s)")
    group.add_argument(
        "--quick",
        action="store_true",
        help="a look in a few minutes: --adapters 0,8 --repeats 1 --peer-repeats 1 "
        "--wave-seconds 12",
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


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return list(dict.fromkeys(names))
