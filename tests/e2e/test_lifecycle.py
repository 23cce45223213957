"""How a server starts, stops, is killed, and starts again."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loraplex.model.config import read_model_config
from loraplex_client import (
    Adapter,
    Client,
    Delta,
    Finished,
    FinishReason,
    Residency,
    Unavailable,
)

from tests.e2e.servers import slow_upload

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker
    from tests.e2e.servers import ServerFactory, ServerProcess

PROMPT = "Once upon a time"


def test_sigterm_lets_running_requests_finish(serve: "ServerFactory", tiny_model: Path) -> None:
    """Those that do so within the drain; one that does not is told."""
    server = serve(f"--model={tiny_model}", "--drain=3")
    with (
        server.client() as client,
        grpc.insecure_channel(server.target) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        short = client.stream(PROMPT, max_tokens=200, ignore_eos=True)
        endless = client.stream(PROMPT, max_tokens=8000, ignore_eos=True)
        next(endless), next(short)
        ended = pool.submit(server.end)
        server.eventually(lambda: "SIGTERM: finishing what runs" in server.log())
        assert health.Check(request).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in (client.server_info, lambda: client.complete(PROMPT, max_tokens=1)):
            with pytest.raises(Unavailable) as refused:
                call()
            assert refused.value.reason == "DRAINING"
        rest = list(short)
        assert isinstance(rest[-1], Finished)
        assert rest[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(e.token_ids) for e in rest if isinstance(e, Delta)) == 200
        assert not ended.done()
        with pytest.raises(Unavailable) as told:
            list(endless)
        assert told.value.reason == "DRAINING"
        assert ended.result() == 0


def test_a_second_signal_ends_it_at_once(serve: "ServerFactory", tiny_model: Path) -> None:
    server = serve(f"--model={tiny_model}", "--drain=60")
    with server.client() as client:
        events = client.stream(PROMPT, max_tokens=8000, ignore_eos=True)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        server.eventually(lambda: "SIGTERM: finishing what runs" in server.log())
        began = time.monotonic()
        assert server.end() == -signal.SIGTERM
        assert time.monotonic() - began < 10
        with pytest.raises(Unavailable):
            list(events)


def test_what_was_acknowledged_survives(
    serve: "ServerFactory", tiny_model: Path, make_adapter: "AdapterMaker", tmp_path: Path
) -> None:
    """Names, pins and half an upload: over a clean end, a kill amid work, and Ctrl-C."""
    base, store, model = read_model_config(tiny_model), tmp_path / "kept", f"--model={tiny_model}"
    folder = make_adapter(base, 8)
    num_sent = (folder / "adapter_model.safetensors").stat().st_size // 2

    first = serve(model, store=store)
    with first.client() as client:
        client.upload_adapter("early", make_adapter(base))
        adapter = client.pin_adapter("early")
        with slow_upload(first, "late", folder, num_sent):
            pass  # it is killed
        said = {"early": greedy(client, "early"), "": greedy(client, "")}
    assert said["early"] != said[""]
    assert first.end() == 0

    second = serve(model, store=store)
    with second.client() as client, closing(client.stream(PROMPT, max_tokens=8000)) as running:
        check_kept(client, adapter)
        second.eventually(lambda: client.get_adapter("early").residency is Residency.DEVICE)
        assert greedy(client, "early") == said["early"]
        next(running)
        begun: list[int] = []
        late = client.upload_adapter("late", folder, progress=lambda at, _: begun.append(at))
        assert num_sent in begun  # what came to the first server does not come again
        assert second.end(signal.SIGKILL) == -signal.SIGKILL
    (store / "uploads/default/torn").mkdir()  # as a kill in mid-upload leaves it

    third = serve(model, store=store)
    with third.client() as client:
        assert not (store / "uploads/default/torn").exists()
        check_kept(client, adapter)
        check_kept(client, late.adapter)
        assert greedy(client, "early") == said["early"]
        assert greedy(client, "") == said[""]
        assert greedy(client, "late") not in said.values()
    assert third.end(signal.SIGINT) == 130


def greedy(client: Client, name: str) -> tuple[int, ...]:
    return client.complete(PROMPT, name, max_tokens=20, temperature=0.0).token_ids


def check_kept(client: Client, adapter: Adapter) -> None:
    """The same name, version, etag and time of birth; it may have been used since."""
    found = client.get_adapter(adapter.adapter_id)
    kept = ("version", "etag", "create_time", "rank", "size_bytes", "state", "pinned")
    assert [getattr(found, name) for name in kept] == [getattr(adapter, name) for name in kept]


def test_the_ready_line_is_true(server: "ServerProcess") -> None:
    assert server.ready.startswith("loraplex: serving smollm2-135m-instruct on 127.0.0.1:")
    assert server.ready.endswith(" (cpu, nf4, 192 MiB for KV and adapters)\n")
    assert not server.target.endswith(":0")
    with server.client() as client:
        info = client.server_info()
    assert (info.model, info.quantization) == ("smollm2-135m-instruct", "nf4")
    assert (info.device, info.dtype) == ("cpu", "bfloat16")
