"""`loraplex generate`: one prompt, one answer, streamed as it comes."""

import argparse
import sys
from collections.abc import Iterable
from contextlib import closing
from typing import TextIO

from loraplex_client.cli_options import UsageError, connect, sampling_of
from loraplex_client.errors import LoraplexError
from loraplex_client.render import error_json, event_json, write, write_json
from loraplex_client.values import Delta, Event

EPILOG = """\
examples:
  loraplex generate "The capital of France is" --max-tokens 20
  loraplex generate --chat "Tell me about the sea." --adapter pirate --temperature 0.7
  loraplex generate --chat "Tell me about the sea." --blend pirate=0.7,emoji=0.3
  cat notes.txt | loraplex generate - --max-tokens 100 --temperature 0
  loraplex generate "Once upon a time" --seed 7 --json | jq -r 'select(.text) | .text'
"""


def run(args: argparse.Namespace) -> int:
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs are shown with --json only")
    if args.adapter_version and not args.adapter:
        raise UsageError("--adapter-version goes with --adapter")
    prompt = _from_stdin() if args.prompt == "-" else args.prompt
    messages = [{"role": "user", "content": prompt}] if args.chat else None
    options = sampling_of(args)
    options["blend"] = args.blend
    options["adapter_version"] = args.adapter_version
    with (
        connect(args) as client,
        closing(
            client.stream(
                None if args.chat else prompt,
                args.adapter,
                messages=messages,
                timeout=args.timeout,
                **options,
            )
        ) as events,
    ):
        _show_all(events, args.json, sys.stdout)
    return 0


def _from_stdin() -> str:
    """All of it but a last newline, which an editor or echo put there."""
    return sys.stdin.read().removesuffix("\n")


def _show_all(events: Iterable[Event], as_json: bool, out: TextIO) -> None:
    """JSON lines, an error among them, or the text alone, whose last line is always ended."""
    last = "\n"
    try:
        for event in events:
            if as_json:
                write_json(event_json(event), out)
            elif isinstance(event, Delta) and event.text:
                write(event.text, out)
                last = event.text
    except LoraplexError as error:
        if as_json:
            write_json(error_json(error), out)
        raise
    finally:
        if not last.endswith("\n"):
            write("\n", out)
