"""A small server that speaks the contract over a real loopback socket, and folders to send it."""

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn
from zlib import crc32

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import (  # type: ignore[import-untyped, unused-ignore]
    error_details_pb2,
    status_pb2,
)
from grpc_status import rpc_status
from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc


def refuse(
    context: Any, code: grpc.StatusCode, reason: str, message: str, *details: Any, **facts: str
) -> NoReturn:
    """Ends a call as the real server does; `facts` are ErrorInfo's."""
    info = error_details_pb2.ErrorInfo(reason=reason, domain="loraplex", metadata=facts)
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in (info, *details):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")


@dataclass(frozen=True)
class Call:
    """One call the server saw."""

    method: str
    metadata: Mapping[str, str]
    request: Any


def words(request: inference_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
    """Says the prompt's words back, one delta each, as the adapter asked for."""
    name = request.adapter_id
    adapters = [inference_pb2.UsedAdapter(adapter_id=name, version="v1")] if name else []
    chat = request.chat.messages
    text = chat[-1].content if chat else request.text
    pieces = re.findall(r"\s*\S+", text)
    yield inference_pb2.GenerateResponse(
        started=inference_pb2.Started(request_id="r1", adapters=adapters, prompt_tokens=7)
    )
    if name:
        pieces.insert(0, f"<{name}>")
    for number, piece in enumerate(pieces):
        yield inference_pb2.GenerateResponse(
            delta=inference_pb2.Delta(text=piece, token_ids=[number])
        )
    yield inference_pb2.GenerateResponse(
        finished=inference_pb2.Finished(
            finish_reason=inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(prompt_tokens=7, completion_tokens=len(pieces)),
            timings=inference_pb2.Timings(queue=0.25, prefill=0.5, decode=1.0),
        )
    )


@dataclass
class FakeServer:
    """Every behaviour is a field that a test replaces; everything it was asked is in `calls`."""

    target: str = ""
    calls: list[Call] = field(default_factory=list)
    adapters: dict[str, adapters_pb2.Adapter] = field(default_factory=dict)
    weights: dict[str, bytes] = field(default_factory=dict)
    partials: dict[str, bytes] = field(default_factory=dict)  # by upload_id
    streams: dict[str, Any] = field(default_factory=dict)  # the newest one's context, by upload_id
    lock: threading.Lock = field(default_factory=threading.Lock)
    generate: Callable[[inference_pb2.GenerateRequest, Any], Iterator[Any]] = words
    upload: Callable[["FakeServer", Iterator[Any], Any], Any] | None = None
    page_size: int = 2

    def saw(self, method: str, request: Any, context: Any) -> None:
        pairs = {str(key): str(value) for key, value in context.invocation_metadata()}
        self.calls.append(Call(method, pairs, request))

    def find(self, adapter_id: str, context: Any) -> adapters_pb2.Adapter:
        if adapter_id not in self.adapters:
            refuse(context, grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", "no such adapter")
        return self.adapters[adapter_id]

    def store(self, header: adapters_pb2.UploadHeader, data: bytes) -> adapters_pb2.Adapter:
        self.weights[header.adapter_id] = data
        adapter = adapters_pb2.Adapter(
            adapter_id=header.adapter_id,
            version="ab" * 32,
            etag="e1",
            kind=adapters_pb2.ADAPTER_KIND_LORA,
            size_bytes=len(data),
            rank=8,
            target_modules=["q_proj", "v_proj"],
            state=adapters_pb2.ADAPTER_STATE_READY,
            residency=adapters_pb2.ADAPTER_RESIDENCY_DISK,
            visibility=adapters_pb2.ADAPTER_VISIBILITY_PRIVATE,
            owner="default",
        )
        adapter.create_time.FromJsonString("2026-01-02T03:04:05Z")
        self.adapters[header.adapter_id] = adapter
        return adapter


def receive(server: FakeServer, requests: Iterator[Any], context: Any) -> Any:
    """The contract's upload, in order and to the last byte."""
    header = next(requests).header
    server.saw("UploadAdapter", header, context)
    with server.lock:
        server.streams[header.upload_id] = context
        committed = len(server.partials.get(header.upload_id, b""))
    if header.resume_offset != committed:
        out_of_range = (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH", "not there")
        refuse(context, *out_of_range, committed_size=str(committed))
    for request in requests:
        if request.HasField("finish"):
            return publish(server, header)
        keep(server, header.upload_id, request.chunk, context)
    refuse(context, grpc.StatusCode.ABORTED, "UPLOAD_INCOMPLETE", "the stream ended early")


def keep(server: FakeServer, upload_id: str, chunk: Any, context: Any) -> None:
    with server.lock:
        if server.streams[upload_id] is not context:
            refuse(context, grpc.StatusCode.ABORTED, "UPLOAD_TAKEN_OVER", "another goes on")
        data = server.partials.get(upload_id, b"")
        assert chunk.offset == len(data)
        assert len(chunk.data) <= 1 << 20
        assert chunk.crc32 == crc32(chunk.data)
        server.partials[upload_id] = data + chunk.data


def publish(server: FakeServer, header: adapters_pb2.UploadHeader) -> Any:
    data = server.partials.pop(header.upload_id, b"")
    assert len(data) == header.total_size
    assert sha256(data).hexdigest() == header.sha256
    created = header.adapter_id not in server.adapters
    return adapters_pb2.UploadAdapterResponse(
        adapter=server.store(header, data), created=created, warnings=["a warning"]
    )


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self.fake.saw("Generate", request, context)
        yield from self.fake.generate(request, context)

    def Tokenize(self, request: Any, context: Any) -> Any:
        self.fake.saw("Tokenize", request, context)
        return inference_pb2.TokenizeResponse(token_ids=[1, 2, 3])

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        self.fake.saw("GetServerInfo", request, context)
        return inference_pb2.GetServerInfoResponse(
            model="tiny",
            device="cpu",
            features=["chat"],
            context_length=512,
            vocab_size=100,
            limits=inference_pb2.ServerLimits(max_rank=64),
        )


class _Adapters(adapters_pb2_grpc.AdapterServiceServicer):
    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake

    def UploadAdapter(self, requests: Any, context: Any) -> Any:
        return (self.fake.upload or receive)(self.fake, requests, context)

    def GetUpload(self, request: Any, context: Any) -> Any:
        self.fake.saw("GetUpload", request, context)
        if request.upload_id not in self.fake.partials:
            refuse(context, grpc.StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", "no such upload")
        return adapters_pb2.GetUploadResponse(
            state=adapters_pb2.UPLOAD_STATE_ACTIVE,
            committed_size=len(self.fake.partials[request.upload_id]),
        )

    def GetAdapter(self, request: Any, context: Any) -> Any:
        self.fake.saw("GetAdapter", request, context)
        return adapters_pb2.GetAdapterResponse(adapter=self.fake.find(request.adapter_id, context))

    def ListAdapters(self, request: Any, context: Any) -> Any:
        self.fake.saw("ListAdapters", request, context)
        names = sorted(name for name in self.fake.adapters if name > request.page_token)
        size = request.page_size or self.fake.page_size
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self.fake.adapters[name] for name in names[:size]],
            next_page_token=names[size - 1] if len(names) > size else "",
        )

    def DeleteAdapter(self, request: Any, context: Any) -> Any:
        self.fake.saw("DeleteAdapter", request, context)
        del self.fake.adapters[self.fake.find(request.adapter_id, context).adapter_id]
        return adapters_pb2.DeleteAdapterResponse()

    def PinAdapter(self, request: Any, context: Any) -> Any:
        self.fake.saw("PinAdapter", request, context)
        adapter = self.fake.find(request.adapter_id, context)
        adapter.pinned = request.pinned
        return adapters_pb2.PinAdapterResponse(adapter=adapter)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    with ThreadPoolExecutor(32) as threads:
        grpc_server = grpc.server(threads)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _Inference(fake), grpc_server
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(  # type: ignore[no-untyped-call]
            _Adapters(fake), grpc_server
        )
        fake.target = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        yield fake
        grpc_server.stop(None).wait(10)


@pytest.fixture
def nobody() -> str:
    """A target where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes a PEFT folder of so many bytes of weights."""

    def make(size: int = 3 * (1 << 20) + 17) -> Path:
        folder = tmp_path / f"adapter-{size}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
        pattern = bytes(range(251))
        weights = pattern * (size // len(pattern) + 1)
        (folder / "adapter_model.safetensors").write_bytes(weights[:size])
        return folder

    return make


class CuttingProxy:
    """Forwards connections to `target`; the first `cuts` of them end after `limit` bytes."""

    def __init__(self, target: str, cuts: int, limit: int) -> None:
        host, port = target.rsplit(":", 1)
        self._address, self._cuts, self._limit = (host, int(port)), cuts, limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            limit = self._limit if self.connections <= self._cuts else None
            thread = threading.Thread(target=self._forward, args=(near, limit))
            thread.start()
            self._threads.append(thread)

    def _forward(self, near: socket.socket, limit: int | None) -> None:
        with near, socket.create_connection(self._address) as far:
            back = threading.Thread(target=_pump, args=(far, near, None))
            back.start()
            _pump(near, far, limit)
            back.join()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    count = 0
    with suppress(OSError):
        while data := source.recv(1 << 16):
            count += len(data)
            if limit is not None and count > limit:
                break
            sink.sendall(data)
    for side in (source, sink):
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cutting_proxy() -> Iterator[Callable[..., CuttingProxy]]:
    proxies: list[CuttingProxy] = []

    def start(target: str, cuts: int, limit: int) -> CuttingProxy:
        proxies.append(CuttingProxy(target, cuts, limit))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


_MAIN = """
import argparse, signal, sys
from loraplex_client import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
parser = argparse.ArgumentParser("loraplex")
cli.add_commands(parser.add_subparsers(required=True))
args = parser.parse_args()
sys.exit(cli.run(args.func, args))
"""


@pytest.fixture
def main_script() -> str:
    """The console script, as far as the client's commands go."""
    return _MAIN


@pytest.fixture
def command(server: FakeServer) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts `loraplex ARGS` in a process of its own, against the fake server."""

    def start(*args: str, **environ: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={"LORAPLEX_SERVER": server.target, "PATH": "", **environ},
        )

    return start
