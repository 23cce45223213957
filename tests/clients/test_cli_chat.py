"""Conversations: what the model is sent at each turn, and how errors and Ctrl-C end a turn."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_client import Client, LoraplexError, NotFound
from loraplex_client.cli_chat import HELP, Chat
from loraplex_protos.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from tests.clients.conftest import FakeServer


def lines(*given: str) -> Callable[[str], str]:
    """input() for somebody who types `given` and then Ctrl-D."""
    left = iter(given)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


class Interrupting(io.StringIO):
    """A terminal at which Ctrl-C is pressed while `at` is being written."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if text == self.at:
            raise KeyboardInterrupt
        return super().write(text)


def talk(
    server: "FakeServer",
    *given: str,
    interactive: bool = True,
    out: io.StringIO | None = None,
    **fields: Any,
) -> tuple[str, str]:
    """(answers, notes) of a conversation."""
    out, notes = out or io.StringIO(), io.StringIO()
    with Client(server.target) as client:
        Chat(client, lines(*given), out, notes, interactive, **fields).run()
    return out.getvalue(), notes.getvalue()


def turns(server: "FakeServer") -> list[tuple[str, list[tuple[str, str]]]]:
    """(adapter, messages) of every request."""
    return [
        (
            call.request.adapter_id,
            [(message.role, message.content) for message in call.request.chat.messages],
        )
        for call in server.calls
        if call.method == "Generate"
    ]


def has(server: "FakeServer", name: str) -> None:
    server.adapters[name] = adapters_pb2.Adapter(adapter_id=name)


def test_every_turn_sends_the_whole_conversation(server: "FakeServer") -> None:
    has(server, "pirate")
    answers, notes = talk(
        server, "one", "/adapter pirate", " two ", "", "/adapter", "three", "/reset", "four",
        interactive=False, system="be brief",
    )  # fmt: skip
    assert answers == "one\n<pirate>two\nthree\nfour\n"
    assert notes == "now pirate\nnow the bare base model\nforgotten\n"
    system, one = ("system", "be brief"), [("user", "one"), ("assistant", "one")]
    two = [("user", "two"), ("assistant", "<pirate>two")]
    assert turns(server) == [
        ("", [system, ("user", "one")]),
        ("pirate", [system, *one, ("user", "two")]),
        ("", [system, *one, *two, ("user", "three")]),
        ("", [system, ("user", "four")]),
    ]


def test_sampling_goes_with_every_turn(server: "FakeServer") -> None:
    talk(server, "one", "two", options={"seed": 3, "stop": ["x"]})
    requests = [call.request for call in server.calls if call.method == "Generate"]
    assert [(request.sampling.seed, list(request.stop.stop)) for request in requests] == [
        (3, ["x"])
    ] * 2


def test_a_person_is_greeted_and_helped(server: "FakeServer") -> None:
    answers, notes = talk(server, "/help", "/dance", "/quit", "not said")
    assert answers == ""
    assert notes.splitlines() == [
        "talking to tiny; /help says what can be typed here",
        HELP,
        f"no command /dance; {HELP}",
    ]


def test_an_unknown_adapter_leaves_the_one_before(server: "FakeServer") -> None:
    has(server, "pirate")
    answers, notes = talk(server, "/adapter parrot", "hi", adapter_id="pirate")
    assert answers == "<pirate>hi\n\n"
    assert notes.splitlines()[1:] == ["no such adapter; still pirate"]


def test_an_unknown_adapter_does_not_end_a_script(
    server: "FakeServer", command: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = command("chat")
    out, err = process.communicate("/adapter parrot\nhi\n", timeout=60)
    assert (process.returncode, out) == (1, "hi\n")
    assert err == "no such adapter; still the bare base model\n"


def test_an_unknown_adapter_at_the_start(server: "FakeServer") -> None:
    with pytest.raises(NotFound):
        talk(server, "hi", adapter_id="parrot")


def _failing_once(server: "FakeServer") -> None:
    answer = server.generate

    def generate(request: Any, context: Any) -> Iterator[Any]:
        server.generate = answer
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="so"))
        context.abort(grpc.StatusCode.INTERNAL, "broke")

    server.generate = generate


def test_a_failed_turn_leaves_no_trace(server: "FakeServer") -> None:
    _failing_once(server)
    answers, notes = talk(server, "one", "two")
    assert answers == "so\ntwo\n\n"
    assert notes.splitlines()[1:] == ["internal: broke"]
    assert turns(server)[1] == ("", [("user", "two")])


def test_a_failed_turn_ends_a_script(server: "FakeServer") -> None:
    _failing_once(server)
    with pytest.raises(LoraplexError, match="broke"):
        talk(server, "one", "two", interactive=False)
    assert len(turns(server)) == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(server: "FakeServer") -> None:
    out = Interrupting(at=" three")
    answers, _ = talk(server, "one two three four", "five", out=out)
    assert answers == "one two\nfive\n\n"
    said = [("user", "one two three four"), ("assistant", "one two three")]
    assert turns(server)[1] == ("", [*said, ("user", "five")])


def test_ctrl_c_ends_a_script(server: "FakeServer") -> None:
    with pytest.raises(KeyboardInterrupt):
        talk(server, "one two", "three", interactive=False, out=Interrupting(at=" two"))


class Terminal:
    """`loraplex chat` on a terminal of its own."""

    def __init__(self, target: str, script: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, "chat", "--server", target],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env={"TERM": "xterm", "PATH": ""},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._ours], [], [], 0.1)[0]:
                self.seen += os.read(self._ours, 4096).decode()
        self.seen = self.seen.split(text, 1)[1]

    def close(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            os.close(self._ours)


def test_on_a_real_terminal(server: "FakeServer", main_script: str) -> None:
    def generate(request: Any, context: Any) -> Iterator[Any]:
        while context.is_active():
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="\x1b[31mx "))
            time.sleep(0.001)

    server.generate = generate
    terminal = Terminal(server.target, main_script)
    terminal.wait_for("talking to tiny")
    terminal.wait_for("base> ")
    terminal.type("hello\n")
    terminal.wait_for("[31mx [31mx ")  # without the escape that would have coloured it
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("base> ")
    time.sleep(0.3)  # a signal between readline's prompt and its select() waits for a key
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("loraplex: interrupted")
    assert terminal.close() == 130
