"""The load harness against a server that speaks the contract, and its command line."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import serving
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from tests.clients.conftest import FakeServer, nobody, refuse, server

__all__ = ["nobody", "server"]  # fixtures


def tokens(request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
    """As many as were asked for; half of the prompt was in the cache."""
    prompt = len(request.token_ids.ids)
    started = inference_pb2.Started(prompt_tokens=prompt, cached_tokens=prompt // 2)
    yield inference_pb2.GenerateResponse(started=started)
    for number in range(request.stop.max_tokens):
        delta = inference_pb2.Delta(text="x", token_ids=[number])
        yield inference_pb2.GenerateResponse(delta=delta)
    timings = inference_pb2.Timings(queue=0.25, adapter_wait=0.5)
    yield inference_pb2.GenerateResponse(finished=inference_pb2.Finished(timings=timings))


@pytest.fixture
def target(server: FakeServer) -> list[str]:
    """Arguments that name the server, which has two adapters."""
    server.generate = tokens
    for name in ("a", "b"):
        server.store(adapters_pb2.UploadHeader(adapter_id=name), b"")
    return ["--server", server.target]


@pytest.mark.parametrize(
    "pace", [["--concurrency", "3"], ["--request-rate", "400"], []], ids=["closed", "open", "all"]
)
def test_a_run(
    pace: list[str], server: FakeServer, target: list[str], tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "out.json"
    load = ["--num-requests", "12", "--prompt-tokens", "6:8", "--max-tokens", "2:5"]
    adapters = ["--adapter", "a", "--adapter", "b", "--popularity", "round-robin"]
    more = ["--repeats", "2", "--warmup", "3", "--slo", "e2el=60000", "--out", str(path)]

    assert serving.main([*target, *load, *adapters, *pace, *more]) == 0

    asked = [call.request for call in server.calls if call.method == "Generate"]
    assert len(asked) == 3 + 2 * 12
    assert Counter(each.adapter_id for each in asked[3:]) == {"a": 12, "b": 12}
    assert all(each.stop.ignore_eos for each in asked)
    record = json.loads(path.read_text())
    assert record["completed"] == 12
    assert record["total_output_tokens"] == sum(each.stop.max_tokens for each in asked[3:]) / 2
    assert record["total_input_tokens"] == sum(len(each.token_ids.ids) for each in asked[3:]) / 2
    assert record["cold_requests"] == 12
    assert record["median_queue_ms"] == 250
    assert 0 < record["cached_input_tokens"] < record["total_input_tokens"]
    assert record["good_share"] == 1
    assert record["wrong_length"] == 0
    assert len(record["runs"]) == 2
    assert str(tmp_path) not in json.dumps(record["settings"])
    assert "| requests | 12 of 12 completed |" in capsys.readouterr().out


def test_a_trace_is_written_and_sent_again(
    server: FakeServer, target: list[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "load.jsonl")
    load = ["--num-requests", "5", "--max-tokens", "1:9", "--request-rate", "500"]
    assert serving.main([*target, *load, "--adapter", "b", "--write-trace", path]) == 0
    assert serving.main([*target, "--trace", path, "--trace-speed", "2", "--seed", "4"]) == 0

    asked = [
        (call.request.adapter_id, tuple(call.request.token_ids.ids), call.request.stop.max_tokens)
        for call in server.calls
        if call.method == "Generate"
    ]
    assert len(asked) == 10
    assert sorted(asked[:5]) == sorted(asked[5:])


def test_errors_are_counted_by_code_and_reason(
    server: FakeServer, target: list[str], tmp_path: Path, capsys: Any
) -> None:
    numbers = iter(range(100))

    def every_other(request: Any, context: Any) -> Iterator[Any]:
        if next(numbers) % 2:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "the queue is full")
        yield from tokens(request, context)

    server.generate = every_other
    assert serving.main([*target, "--num-requests", "8", "--concurrency", "1"]) == 0
    assert "| error RESOURCE_EXHAUSTED QUEUE_FULL | 4 |" in capsys.readouterr().out


def test_what_is_cut_off_is_no_error(server: FakeServer, target: list[str], tmp_path: Path) -> None:
    stalled = threading.Event()

    def stall(request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(stalled.set)
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(token_ids=[1]))
        stalled.wait(60)

    server.generate = stall
    path = tmp_path / "out.json"
    load = ["--num-requests", "3", "--duration", "0.3", "--out", str(path)]
    assert serving.main([*target, *load]) == 1  # none was answered

    record = json.loads(path.read_text())
    assert (record["completed"], record["failed"], record["unfinished"]) == (0, 0, 3)
    assert stalled.is_set()


def test_ctrl_c_tells_what_there_is(server: FakeServer, target: list[str], capsys: Any) -> None:
    numbers = iter(range(100))

    def interrupting(request: Any, context: Any) -> Iterator[Any]:
        yield from tokens(request, context)
        if next(numbers) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    server.generate = interrupting
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert serving.main([*target, "--concurrency", "1", "--num-requests", "10000"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    assert "Incomplete" in out
    assert re.search(r"[1-9]\d* of 10000 completed", out)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--adapter", "a", "--adapter", "c"], "the server has no adapter c"),
        (["--prompt-tokens", "500"], "does not fit into this server's context of 512"),
        (["--num-adapters", "1", "--rank", "128"], "adapters of rank 64 at most"),
    ],
)
def test_what_the_server_cannot_do_is_said_at_once(
    args: list[str], why: str, server: FakeServer, target: list[str], capsys: Any
) -> None:
    assert serving.main([*target, *args]) == 1
    assert why in capsys.readouterr().err
    assert not any(call.method == "Generate" for call in server.calls)


def test_nobody_there(nobody: str, capsys: Any) -> None:
    assert serving.main(["--server", nobody]) == 1
    assert capsys.readouterr().err == f"serving.py: no server at {nobody}\n"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--request-rate", "0"], "'0' is not a positive number"),
        (["--slo", "ttft=1,ttft=2"], "each once"),
        (["--slo", "wait=1"], "objectives are ttft=MS"),
        (["--popularity", "zipf:x"], "'x' is no number"),
        (["--max-tokens", "9:1"], "9 is more than 1"),
        (["--trace-speed", "2"], "--trace-speed needs --trace"),
        (["--trace", "x", "--num-adapters", "2"], "names its adapters itself"),
        (["--popularity", "distinct", "--num-adapters", "2"], "need as many adapters, not 2"),
        (["--popularity", "weights:1,2", "--num-adapters", "3"], "2 of them for 3 adapters"),
        (["--plot"], "--plot needs --out or --save"),
        (["--out", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["--rank", "0"], "a rank is at least 1"),
    ],
)
def test_usage(args: list[str], why: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        serving.main(args)
    assert why in capsys.readouterr().err


def test_a_server_elsewhere_needs_no_torch_here(nobody: str) -> None:
    code = (
        "import sys, serving\n"
        f"assert serving.main(['--server', {nobody!r}]) == 1\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()\n"
    )
    folder = Path(serving.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stderr=subprocess.PIPE)
