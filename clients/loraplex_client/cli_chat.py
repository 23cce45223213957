"""`loraplex chat`: a conversation in which the adapter may change at any turn."""

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TextIO

from loraplex_client.cli_options import connect, sampling_of
from loraplex_client.client import Client
from loraplex_client.errors import InvalidArgument, LoraplexError, NotFound
from loraplex_client.render import one_line, write
from loraplex_client.values import Delta
from loraplex_client.wire import GenerateOptions

EPILOG = """\
in the conversation:
  /adapter NAME    go on with this adapter; without NAME, with the bare base model
  /reset           forget the conversation
  /help            what can be typed here
  /quit            leave (so does Ctrl-D); Ctrl-C stops an answer

examples:
  loraplex chat
  loraplex chat --adapter pirate --system "Answer in one sentence." --temperature 0.7
  printf 'Hello!\\n/adapter pirate\\nHello again!\\n' | loraplex chat
"""

HELP = "/adapter NAME switches (/adapter alone: the base), /reset forgets, /quit leaves"


@dataclass(slots=True)
class Chat:
    """One conversation. `history` and `adapter_id` change as it goes on, and `refused`, whether
    an /adapter of a script was.

    `read` gives the next line and raises EOFError after the last, as input() does. With a person
    at the other end (`interactive`) an error is shown and the talk goes on, and Ctrl-C stops an
    answer; in a script both end it. An /adapter that is refused leaves the one before in either.
    """

    client: Client
    read: Callable[[str], str]
    out: TextIO
    notes: TextIO
    interactive: bool
    adapter_id: str = ""
    system: str | None = None
    timeout: float | None = None
    options: GenerateOptions = field(default_factory=GenerateOptions)
    history: list[Mapping[str, object]] = field(default_factory=list)
    refused: bool = False

    def run(self) -> None:
        self._begin()
        while True:
            try:
                line = self.read(f"{self.adapter_id or 'base'}> ").strip()
            except EOFError:
                if self.interactive:
                    write("\n", self.out)
                return
            if line == "/quit":
                return
            if line:
                self._attempt(line)

    def _begin(self) -> None:
        if self.adapter_id:
            self.client.get_adapter(self.adapter_id, timeout=self.timeout)
        if self.interactive:
            model = self.client.server_info(timeout=self.timeout).model
            self._note(f"talking to {model}; /help says what can be typed here")

    def _attempt(self, line: str) -> None:
        try:
            self._handle(line)
        except LoraplexError as error:
            if not self.interactive:
                raise
            self._note(str(error))

    def _handle(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/adapter":
            self._switch(argument.strip())
        elif command == "/reset":
            self.history.clear()
            self._note("forgotten")
        elif command == "/help":
            self._note(HELP)
        elif command.startswith("/"):
            self._note(f"no command {command}; {HELP}")
        else:
            self._ask(line)

    def _switch(self, adapter_id: str) -> None:
        try:
            if adapter_id:
                self.client.get_adapter(adapter_id, timeout=self.timeout)
        except (NotFound, InvalidArgument) as error:
            self.refused = not self.interactive
            self._note(f"{error}; still {self._talks_with()}")
            return
        self.adapter_id = adapter_id
        self._note(f"now {self._talks_with()}")

    def _talks_with(self) -> str:
        return self.adapter_id or "the bare base model"

    def _ask(self, text: str) -> None:
        """One turn. A failed one leaves no trace in the history; a stopped one what was said."""
        answer: list[str] = []
        question = {"role": "user", "content": text}
        try:
            self._stream([*self._preamble(), *self.history, question], answer)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        except LoraplexError:
            if answer:
                write("\n", self.out)
            raise
        write("\n", self.out)
        if answer:
            self.history += [question, {"role": "assistant", "content": "".join(answer)}]

    def _preamble(self) -> list[Mapping[str, object]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _stream(self, messages: list[Mapping[str, object]], answer: list[str]) -> None:
        events = self.client.stream(
            adapter_id=self.adapter_id, messages=messages, timeout=self.timeout, **self.options
        )
        with closing(events):
            for event in events:
                if isinstance(event, Delta) and event.text:
                    answer.append(event.text)
                    write(event.text, self.out)

    def _note(self, text: str) -> None:
        """For the person, never part of the answers."""
        self.notes.write(one_line(text) + "\n")
        self.notes.flush()


def _read_line(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _editing_input() -> Callable[[str], str]:
    """input(), with line editing and history where Python was built with them."""
    with suppress(ImportError):
        import readline  # noqa: F401
    return input


def run(args: argparse.Namespace) -> int:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with connect(args) as client:
        chat = Chat(
            client,
            read=_editing_input() if interactive else _read_line,
            out=sys.stdout,
            notes=sys.stderr,
            interactive=interactive,
            adapter_id=args.adapter,
            system=args.system,
            timeout=args.timeout,
            options=sampling_of(args),
        )
        chat.run()
    return 1 if chat.refused else 0
