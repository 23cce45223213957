"""The client's half of the command line: what its commands are called, and how they end.

`add_commands` puts generate, chat and adapters on a parser, each with `func`; `run` calls one and
turns whatever happens into an exit code: 0, 2 for usage, 130 after Ctrl-C, and 1 with one clear
line on stderr for everything else.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import TypeAlias

from loraplex_client import cli_adapters, cli_chat, cli_generate
from loraplex_client.cli_options import (
    UsageError,
    add_connection,
    add_logprobs,
    add_sampling,
    blend_weights,
)
from loraplex_client.errors import DeadlineExceeded, LoraplexError, ServerUnreachable
from loraplex_client.render import one_line

Command = Callable[[argparse.Namespace], int]
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_logger = logging.getLogger(__name__)


def add_commands(
    subparsers: Subparsers,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Registers every client command; `environ` has the defaults of --server and --token."""
    _add_generate(subparsers, environ)
    _add_chat(subparsers, environ)
    _add_adapters(subparsers, environ)


def _add(
    subparsers: Subparsers,
    name: str,
    what: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    return subparsers.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_generate(subparsers: Subparsers, environ: Mapping[str, str]) -> None:
    parser = _add(subparsers, "generate", "answer one prompt", cli_generate.EPILOG)
    parser.add_argument("prompt", help="the text to go on from; - reads it from stdin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--adapter", default="", metavar="NAME", help="answer with this adapter (default: none)"
    )
    which.add_argument(
        "--blend",
        type=blend_weights,
        metavar="NAME=W,NAME=W",
        help="answer with the weighted sum of several adapters, for this request alone",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt through the chat template, as a user's message",
    )
    parser.add_argument(
        "--adapter-version",
        metavar="VERSION",
        help="with --adapter: fail unless this is its version now (adapters show NAME tells it)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each event")
    add_logprobs(parser)
    add_sampling(parser)
    add_connection(parser, environ)
    parser.set_defaults(func=cli_generate.run)


def _add_chat(subparsers: Subparsers, environ: Mapping[str, str]) -> None:
    parser = _add(subparsers, "chat", "hold a conversation", cli_chat.EPILOG)
    parser.add_argument("--adapter", default="", metavar="NAME", help="begin with this adapter")
    parser.add_argument("--system", metavar="TEXT", help="a system message before everything else")
    add_sampling(parser)
    add_connection(parser, environ)
    parser.set_defaults(func=cli_chat.run)


def _add_adapters(subparsers: Subparsers, environ: Mapping[str, str]) -> None:
    what = "manage the server's adapters"
    actions = _add(subparsers, "adapters", what, cli_adapters.EPILOG).add_subparsers(
        metavar="ACTION", required=True
    )

    def action(name: str, what: str, func: Command) -> argparse.ArgumentParser:
        parser = _add(actions, name, what)
        if name != "list":
            parser.add_argument("name", metavar="NAME", help="the adapter's name on the server")
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
        add_connection(parser, environ)
        parser.set_defaults(func=func)
        return parser

    upload = action("upload", "send a PEFT folder to the server", cli_adapters.upload)
    upload.add_argument(
        "folder",
        metavar="DIR",
        help="holds adapter_config.json and adapter_model.safetensors (or its parts and index)",
    )
    upload.add_argument(
        "--replace",
        action="store_true",
        help="even if the name holds other content; requests that run on that finish on it",
    )
    upload.add_argument(
        "--if-match",
        type=_etag,
        metavar="ETAG",
        help="replace, but only if the name still has this etag (adapters show NAME tells it)",
    )
    action("list", "show all adapters", cli_adapters.list_all)
    action("show", "show one adapter", cli_adapters.show)
    action("delete", "take a name away; what runs on it finishes", cli_adapters.delete)
    pin = action("pin", "keep an adapter in device memory", cli_adapters.pin)
    pin.set_defaults(pinned=True)
    unpin = action("unpin", "let it leave device memory when room is needed", cli_adapters.pin)
    unpin.set_defaults(pinned=False)


def _etag(text: str) -> str:
    if not text:  # an unset variable in a script must not become "whatever is there"
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def run(func: Command, args: argparse.Namespace, expected: tuple[type[Exception], ...] = ()) -> int:
    """The exit code of one command. `expected` errors speak for themselves, as our own do."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = func(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _end(130, "interrupted")
    except BrokenPipeError:
        return _end_broken_pipe()
    except UsageError as error:
        return _end(2, str(error))
    except Exception as error:
        _logger.debug("the command failed", exc_info=True)
        return _end(1, _describe(error, expected))


# What can be done about it, in the words of these commands.
_HINTS: Mapping[str | None, str] = {
    "ADAPTER_EXISTS": "here: --replace",
    "ADAPTER_NOT_FOUND": "those that there are: loraplex adapters list",
    "UPLOAD_IN_PROGRESS": "try again when that one has ended",
    "UPLOAD_TAKEN_OVER": "the same folder is being uploaded by another command, which goes on",
}


def _hint(error: LoraplexError) -> str | None:
    if isinstance(error, ServerUnreachable):
        return _hint_of_unreachable(error)
    if isinstance(error, DeadlineExceeded) and error.reason is None:
        return "--timeout"
    if error.reason == "ETAG_MISMATCH":
        is_there = "etag" in error.metadata
        return (
            "its etag now: loraplex adapters show NAME"
            if is_there
            else "to make it, leave --if-match out"
        )
    if error.reason == "PINS_EXCEED_MEMORY":
        option = error.metadata.get("option", "--memory")
        return f"unpin another adapter first, or serve with more {option}"
    if error.reason in _HINTS:
        return _HINTS[error.reason]
    if error.retry_after is not None:
        return f"try again in {error.retry_after:.3g} s"
    return None


def _hint_of_unreachable(error: ServerUnreachable) -> str | None:
    if error.message.startswith("no server"):
        return "start one with: loraplex serve"
    if "handshake" in error.message or "Socket closed" in error.message:
        return "does TLS match? --tls or --tls-ca for a server with --tls-cert, neither for others"
    return None


def _describe(error: Exception, expected: tuple[type[Exception], ...]) -> str:
    if isinstance(error, LoraplexError) and (hint := _hint(error)) is not None:
        return f"{error} ({hint})"
    if isinstance(error, (LoraplexError, *expected)):
        return str(error)
    if isinstance(error, UnicodeError):
        return "the text is not valid UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return f"unexpected {type(error).__name__}: {error}"


def _end(code: int, message: str) -> int:
    sys.stderr.write(f"loraplex: {one_line(message)}\n")
    return code


def _end_broken_pipe() -> int:
    """Whoever read our output has gone: nothing to say, and nothing more to flush at exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
