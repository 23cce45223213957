"""The commands as a shell sees them: output, exit codes, and what goes to which stream."""

import argparse
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_client import (
    Aborted,
    DeadlineExceeded,
    LoraplexError,
    ResourceExhausted,
    ServerUnreachable,
    cli,
)
from loraplex_client.cli_options import _FIELDS
from loraplex_protos.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.clients.conftest import CuttingProxy, FakeServer

MakeAdapter = Callable[..., Path]
Command = Callable[..., "subprocess.Popen[str]"]


def finish(process: "subprocess.Popen[str]", stdin: str = "") -> tuple[int, str, str]:
    """(exit code, stdout, stderr); neither ever holds an escape code, for both are pipes."""
    out, err = process.communicate(stdin, timeout=60)
    assert "\x1b" not in out + err
    return process.returncode, out, err


def test_generate(server: "FakeServer", command: Command) -> None:
    flags = ("--adapter", "pirate", "--adapter-version", "v1")
    assert finish(command("generate", "one two", *flags)) == (0, "<pirate>one two\n", "")
    assert server.calls[0].request.adapter_version == "v1"


def test_every_sampling_flag_arrives(server: "FakeServer", command: Command) -> None:
    flags = (
        *("--temperature=0.5", "--top-p=0.25", "--top-k=3", "--min-p=0.125"),
        *("--repetition-penalty=1.5", "--presence-penalty", "-1", "--frequency-penalty=0.5"),
        *("--seed=18446744073709551615", "--max-tokens=5", "--min-tokens=0", "--ignore-eos"),
        *("--stop=a", "--stop=b", "--stop-token-id=1", "--stop-token-id=2", "--logprobs=0"),
        *("--priority", "-7"),
    )
    assert finish(command("generate", "x", "--json", *flags))[0] == 0
    request = server.calls[0].request
    assert request.sampling == inference_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=0.5,
        seed=2**64 - 1,
    )
    assert request.stop == inference_pb2.StopParams(
        max_tokens=5, min_tokens=0, stop=["a", "b"], stop_token_ids=[1, 2], ignore_eos=True
    )
    assert request.output == inference_pb2.OutputOptions(logprobs=0)
    assert request.priority == -7
    parts = (request.sampling, request.stop, request.output)
    assert {name for part in parts for name in part.DESCRIPTOR.fields_by_name} == set(_FIELDS)


def test_unset_flags_are_unset_on_the_wire(server: "FakeServer", command: Command) -> None:
    assert finish(command("generate", "x"))[0] == 0
    assert server.calls[0].request == inference_pb2.GenerateRequest(text="x")


def test_a_prompt_from_stdin_as_a_chat(server: "FakeServer", command: Command) -> None:
    code, out, _ = finish(command("generate", "-", "--chat"), "Grüße\nalle\n")
    assert (code, out) == (0, "Grüße\nalle\n")
    (message,) = server.calls[0].request.chat.messages
    assert (message.role, message.content) == ("user", "Grüße\nalle")


def test_generate_json_is_one_event_a_line(server: "FakeServer", command: Command) -> None:
    code, out, err = finish(command("generate", "one\x1b two", "--json"))
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "delta", "finished"]
    assert events[1] == {"event": "delta", "text": "one\x1b", "token_ids": [0], "logprobs": []}
    assert events[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 2


def test_text_comes_as_it_is_made(server: "FakeServer", command: Command) -> None:
    go_on = threading.Event()

    def generate(request: Any, context: Any) -> Iterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="first\n"))
        go_on.wait(30)
        yield inference_pb2.GenerateResponse(finished=inference_pb2.Finished())

    server.generate = generate
    process = command("generate", "x")
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    go_on.set()
    assert finish(process)[0] == 0


def _endless(request: Any, context: Any) -> Iterator[Any]:
    while context.is_active():
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="x\n"))
        time.sleep(0.001)


@pytest.mark.parametrize("arguments", [("generate", "x"), ("generate", "x", "--json"), ("chat",)])
def test_ctrl_c_is_one_quiet_line(
    server: "FakeServer", command: Command, arguments: tuple[str, ...]
) -> None:
    server.generate = _endless
    process = command(*arguments)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (130, "loraplex: interrupted\n")


def test_ctrl_c_in_an_upload(
    server: "FakeServer", command: Command, make_adapter: MakeAdapter
) -> None:
    started, gone = threading.Event(), threading.Event()

    def stall(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        next(requests)
        context.add_callback(gone.set)
        started.set()
        gone.wait(30)
        return None

    server.upload = stall
    process = command("adapters", "upload", "a", str(make_adapter(8 << 20)))
    assert started.wait(30)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert "the same command goes on from there" in err
    assert err.endswith("loraplex: interrupted\n")
    assert gone.is_set()


def test_a_reader_that_goes_is_no_news(server: "FakeServer", command: Command) -> None:
    server.generate = _endless
    process = command("generate", "x")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) == 1
    process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required"),
        (("generate",), "required: prompt"),
        (("adapters",), "required: ACTION"),
        (("generate", "x", "--top-k", "-1"), "'-1' is not a whole number of at least 0"),
        (("generate", "x", "--top-k", "1.5"), "'1.5' is not a whole number"),
        (("generate", "x", "--temperature", "nan"), "'nan' is not a number"),
        (
            ("generate", "x", "--timeout", "1e-4"),
            "'1e-4' is not a number of seconds of at least 0.001",
        ),
        (("generate", "x", "--max-tokens", "0"), "'0' is not a whole number of at least 1"),
        (("generate", "x", "--max-tokens", "-1"), "'-1' is not a whole number of at least 1"),
        (("generate", "x", "--server", "host"), "'host' is not HOST:PORT"),
        (("generate", "x", "--server", "http://a:1"), "must be HOST:PORT, without http://"),
        (("generate", "x", "--adapter-version", "v"), "goes with --adapter"),
        (("generate", "x", "--logprobs", "2"), "--json only"),
        (("chat", "--logprobs", "2"), "unrecognized arguments"),
        (("generate", "x", "--token", "a\nb"), "token"),
        (("adapters", "upload", "a"), "required: DIR"),
        (("generate", "x", "--blend", "a"), "'a' is not NAME=WEIGHT,NAME=WEIGHT"),
        (("generate", "x", "--blend", "a=1,a=2"), "a is there twice"),
        (("adapters", "upload", "a", "b", "--if-match", ""), "must not be empty"),
        (("generate", "x", "--blend", "a=x"), "'x' is not a number"),
        (("generate", "x", "--blend", "a=1,b=1", "--adapter", "c"), "not allowed with"),
    ],
)
def test_usage(command: Command, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = finish(command(*arguments))
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "x"),
        ("chat", "--adapter", "a"),
        ("adapters", "list"),
        ("adapters", "show", "a"),
        ("adapters", "delete", "a"),
        ("adapters", "pin", "a"),
    ],
)
def test_nobody_there(command: Command, nobody: str, arguments: tuple[str, ...]) -> None:
    code, out, err = finish(command(*arguments, "--server", nobody))
    assert (code, out) == (1, "")
    assert err == f"loraplex: no server at {nobody} (start one with: loraplex serve)\n"


def test_any_other_failure_is_one_line(server: "FakeServer", command: Command) -> None:
    def refuse(request: Any, context: Any) -> Iterator[Any]:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "two\r\nlines \x1b[31mred")
        return iter(())

    server.generate = refuse
    assert finish(command("generate", "x")) == (
        1,
        "",
        "loraplex: failed precondition: two lines [31mred\n",
    )
    assert finish(command("adapters", "show", "a")) == (
        1,
        "",
        "loraplex: no such adapter (those that there are: loraplex adapters list)\n",
    )
    code, _, err = finish(command("generate", "x", "--tls-ca", "/nowhere.pem"))
    assert (code, err) == (1, "loraplex: /nowhere.pem: No such file or directory\n")


def test_text_that_is_not_utf8(command: Command) -> None:
    process = command("generate", os.fsdecode(b"\xff\xfe"))
    assert finish(process) == (1, "", "loraplex: the text is not valid UTF-8\n")


def test_what_breaks_off_still_ends_its_line(server: "FakeServer", command: Command) -> None:
    def break_off(request: Any, context: Any) -> Iterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="so far"))
        context.abort(grpc.StatusCode.INTERNAL, "no more")

    server.generate = break_off
    code, out, err = finish(command("generate", "x"))
    assert (code, out, err) == (1, "so far\n", "loraplex: internal: no more\n")
    code, out, _ = finish(command("generate", "x", "--json"))
    assert code == 1
    assert json.loads(out.splitlines()[-1]) == {
        "event": "error",
        "code": "INTERNAL",
        "reason": None,
        "message": "internal: no more",
        "retry_after": None,
    }


def test_token_and_server_come_from_the_environment(
    server: "FakeServer", command: Command, nobody: str
) -> None:
    assert finish(command("adapters", "list", LORAPLEX_TOKEN="secret\n"))[0] == 0
    assert server.calls[0].metadata["authorization"] == "Bearer secret"
    assert finish(command("adapters", "list", LORAPLEX_SERVER=nobody))[0] == 1
    assert "secret" not in finish(command("generate", "--help", LORAPLEX_TOKEN="secret"))[1]


def test_the_life_of_an_adapter(
    server: "FakeServer", command: Command, make_adapter: MakeAdapter
) -> None:
    folder = str(make_adapter(2000))
    assert finish(command("adapters", "list")) == (
        0,
        "",
        "no adapters (add one with: loraplex adapters upload NAME DIR)\n",
    )
    assert finish(command("adapters", "upload", "pirate", folder)) == (
        0,
        "uploaded pirate (rank 8, 2.0 KiB, version abababababab)\n",
        "loraplex: warning: a warning\n",
    )
    flags = ("--replace", "--if-match=e1", "--json")
    code, out, _ = finish(command("adapters", "upload", "a", folder, *flags))
    assert code == 0
    assert json.loads(out)["adapter"]["create_time"] == "2026-01-02T03:04:05+00:00"
    header = server.calls[-1].request
    assert (header.replace, header.if_match_etag) == (True, "e1")

    facts = "8     2.0 KiB  ready  disk   no      0       never      abababababab  q_proj,v_proj"
    assert finish(command("adapters", "list"))[1].splitlines() == [
        "NAME    RANK  SIZE     STATE  WHERE  PINNED  IN USE  LAST USED  VERSION       MODULES",
        f"a       {facts}",
        f"pirate  {facts}",
    ]
    listed = finish(command("adapters", "list", "--json"))[1].splitlines()
    assert [json.loads(line)["adapter_id"] for line in listed] == ["a", "pirate"]

    server.adapters["a"].references = 3
    server.adapters["a"].last_used_time.GetCurrentTime()
    assert finish(command("adapters", "pin", "a"))[1] == "pinned a\n"
    shown = finish(command("adapters", "show", "a"))[1]
    assert re.search(r"^pinned +yes, but not there$", shown, re.MULTILINE)
    assert re.search(r"^size_bytes +2000 \(2.0 KiB\)$", shown, re.MULTILINE)
    assert re.search(r"^residency +disk$", shown, re.MULTILINE)
    assert re.search(r"^references +3 \(requests that use it now\)$", shown, re.MULTILINE)
    assert re.search(r"^last_used_time +\S+ \(\d+ \w+ ago\)$", shown, re.MULTILINE)
    assert len({re.match(r"\w+ +", line).end() for line in shown.splitlines()}) == 1  # type: ignore[union-attr]
    assert json.loads(finish(command("adapters", "show", "a", "--json"))[1])["pinned"] is True
    assert finish(command("adapters", "unpin", "a"))[1] == "unpinned a\n"
    assert finish(command("adapters", "delete", "a"))[1] == "deleted a\n"
    assert sorted(server.adapters) == ["pirate"]


@pytest.mark.parametrize(
    ("error", "help_"),
    [
        (Aborted("no", reason="ADAPTER_EXISTS"), "--replace"),
        (Aborted("no", reason="ETAG_MISMATCH", metadata={"etag": "e"}), "adapters show"),
        (Aborted("no", reason="ETAG_MISMATCH"), "leave --if-match out"),
        (Aborted("no", reason="UPLOAD_IN_PROGRESS"), "try again"),
        (Aborted("no", reason="UPLOAD_TAKEN_OVER"), "goes on"),
        (
            Aborted("no", reason="PINS_EXCEED_MEMORY", metadata={"option": "--max-slots"}),
            "more --max-slots",
        ),
        (
            Aborted("no", reason="PINS_EXCEED_MEMORY", metadata={"option": "--memory"}),
            "more --memory",
        ),
        (ResourceExhausted("no", reason="QUEUE_FULL", retry_after=2.5), "try again in 2.5 s"),
        (DeadlineExceeded("stopped by the timeout after 3 tokens"), "--timeout"),
        (ServerUnreachable("cannot reach a:1: Socket closed"), "does TLS match?"),
    ],
)
def test_errors_say_what_can_be_done(
    error: LoraplexError, help_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    assert cli.run(fail, argparse.Namespace()) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"loraplex: {error} (")
    assert help_ in line


def test_an_upload_says_that_it_tries_again(
    server: "FakeServer",
    command: Command,
    make_adapter: MakeAdapter,
    cutting_proxy: Callable[..., "CuttingProxy"],
) -> None:
    proxy = cutting_proxy(server.target, cuts=100, limit=100_000)
    arguments = ("a", str(make_adapter()), "--server", proxy.target, "--timeout", "2")
    code, out, err = finish(command("adapters", "upload", *arguments))
    assert (code, out) == (1, "")
    first, *_, kept, last = err.splitlines()
    assert first.startswith(f"loraplex: the connection to {proxy.target} failed")
    assert first.endswith("; trying again (1 of 6)")
    assert "the same command goes on from there" in kept
    assert last.startswith("loraplex: ")


def test_a_blend(server: "FakeServer", command: Command) -> None:
    assert finish(command("generate", "x", "--blend", "a=0.7,b=-1e-1"))[0] == 0
    request = server.calls[0].request
    assert {member.adapter_id: member.weight for member in request.blend} == {"a": 0.7, "b": -0.1}
    assert request.adapter_id == ""


def test_a_folder_that_is_no_adapter(command: Command, tmp_path: Path) -> None:
    code, out, err = finish(command("adapters", "upload", "a", str(tmp_path)))
    assert (code, out) == (1, "")
    assert err.startswith(f"loraplex: {tmp_path} holds no adapter_model.safetensors")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("command_name", "example"),
    [("generate", "loraplex generate"), ("chat", "/adapter NAME"), ("adapters", "upload pirate")],
)
def test_help_teaches(command: Command, command_name: str, example: str) -> None:
    code, out, _ = finish(command(command_name, "--help"))
    assert code == 0
    assert "examples:" in out
    assert example in out
    assert max(map(len, out.splitlines())) <= 100
