"""The flags that several commands share, and what becomes of them."""

import argparse
from collections.abc import Callable, Mapping

from loraplex_client.client import Client
from loraplex_client.wire import GenerateOptions

DEFAULT_SERVER = "127.0.0.1:50051"


class UsageError(Exception):
    """A command line that cannot be meant as it stands: exit code 2."""


def _number(
    kind: type[int] | type[float], low: float, high: float, what: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


_FLOAT_MAX = 3.4e38
_COUNT = _number(int, 1, 2**32 - 1, "a whole number of at least 1")
_UINT32 = _number(int, 0, 2**32 - 1, "a whole number of at least 0")
_INT32 = _number(int, -(2**31), 2**31 - 1, "a whole number from -2^31 to 2^31 - 1")
_UINT64 = _number(int, 0, 2**64 - 1, "a whole number from 0 to 2^64 - 1")
_FLOAT = _number(float, -_FLOAT_MAX, _FLOAT_MAX, "a number")
_SECONDS = _number(float, 0.001, 10**9, "a number of seconds of at least 0.001")


def _target(text: str) -> str:
    scheme, separator, _ = text.partition("://")
    if separator and scheme in ("http", "https"):
        secure = " (--tls is for a server that has --tls-cert)" if scheme == "https" else ""
        raise argparse.ArgumentTypeError(f"{text!r} must be HOST:PORT, without {scheme}://{secure}")
    if ":" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def blend_weights(text: str) -> dict[str, float]:
    """`a=0.7,b=0.3` as weights by name."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, weight = part.partition("=")
        if not (name and equals):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=WEIGHT,NAME=WEIGHT")
        if name in weights:
            raise argparse.ArgumentTypeError(f"{name} is there twice")
        weights[name] = _FLOAT(weight)
    return weights


def add_connection(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """--server, --token, --timeout, --tls; `environ` has their defaults."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--server",
        metavar="HOST:PORT",
        type=_target,
        default=environ.get("LORAPLEX_SERVER") or DEFAULT_SERVER,
        help=f"where it listens (default: LORAPLEX_SERVER, else {DEFAULT_SERVER})",
    )
    group.add_argument(
        "--token",
        default=environ.get("LORAPLEX_TOKEN") or None,
        help="sent as a bearer token (default: LORAPLEX_TOKEN, which other users cannot see)",
    )
    group.add_argument(
        "--timeout", type=_SECONDS, metavar="SECONDS", help="give up after so long (default: never)"
    )
    group.add_argument("--tls", action="store_true", help="connect with TLS")
    group.add_argument("--tls-ca", metavar="FILE", help="TLS, trusting the roots of this PEM file")


def connect(args: argparse.Namespace) -> Client:
    token: str | None = args.token
    try:
        return Client(args.server, token and token.strip(), args.tls_ca or args.tls)
    except ValueError as error:
        raise UsageError(str(error)) from None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of SamplingParams and StopParams, and the priority."""
    length = parser.add_argument_group("length")
    length.add_argument(
        "--max-tokens",
        type=_COUNT,
        metavar="N",
        help="at most so many tokens (default: what the context leaves, often thousands)",
    )
    length.add_argument("--min-tokens", type=_UINT32, metavar="N", help="no stop before so many")
    length.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop before this text (repeatable)"
    )
    length.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        action="append",
        type=_UINT32,
        metavar="ID",
        help="stop at this token (repeatable)",
    )
    length.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="go on past the model's own end of text",
    )
    _add_drawing(parser)
    parser.add_argument(
        "--priority",
        type=_INT32,
        metavar="N",
        help="where requests wait for each other the higher goes first (default: 0)",
    )


def add_logprobs(parser: argparse.ArgumentParser) -> None:
    """The one field of OutputOptions, for a command that has --json."""
    parser.add_argument(
        "--logprobs",
        type=_UINT32,
        metavar="N",
        help="with --json: log probabilities, and the N likeliest tokens",
    )


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "unset: as the model's own configuration says")
    for flag, parse, name, text in (
        ("--temperature", _FLOAT, "T", "0 is greedy: the most likely token, always"),
        ("--top-p", _FLOAT, "P", "only the most likely tokens that together hold P"),
        ("--top-k", _UINT32, "K", "only the K most likely tokens; 0 is off"),
        ("--min-p", _FLOAT, "P", "only tokens at least P times as likely as the likeliest"),
        ("--repetition-penalty", _FLOAT, "X", "over prompt and answer; 1 is off"),
        ("--presence-penalty", _FLOAT, "X", "once for each token the answer has; 0 is off"),
        ("--frequency-penalty", _FLOAT, "X", "for each time the answer has it; 0 is off"),
        ("--seed", _UINT64, "S", "the same seed gives the same answer"),
    ):
        group.add_argument(flag, type=parse, metavar=name, help=text)


_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs"),
)


def sampling_of(args: argparse.Namespace) -> GenerateOptions:
    """What was said on the command line; the rest is None, the server's to choose."""
    options: GenerateOptions = {"priority": args.priority}
    for name in _FIELDS:
        options[name] = getattr(args, name, None)  # type: ignore[literal-required]
    return options
