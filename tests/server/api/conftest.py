"""The real gRPC server and store over a loopback socket, around an engine that tests play."""

import asyncio
import codecs
import hashlib
import json
import shutil
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import NAMESPACE_OID, uuid5
from zlib import crc32

import grpc
import pytest
from google.rpc import (  # type: ignore[import-untyped, unused-ignore]
    error_details_pb2,
    status_pb2,
)
from grpc import StatusCode
from loraplex.adapters.peft import AdapterConfig, AdapterSpec, read_config, version_of
from loraplex.adapters.store import AdapterRecord, AdapterStore, Upload
from loraplex.adapters.tiers import Tier
from loraplex.api.protocols import Limits, ModelInfo
from loraplex.api.server import ApiServer
from loraplex.engine.sequence import (
    Finished,
    FinishReason,
    SamplingParams,
    Sequence,
    Timings,
    Tokens,
)
from loraplex.engine.stream import Event, TokenStream
from loraplex.errors import AdapterInvalidError, RequestError
from loraplex.metrics import Metrics
from loraplex_protos.v1 import adapters_pb2, inference_pb2
from prometheus_client import CollectorRegistry

BASE_ID = "b" * 64
EOS = 256  # token ids below are the bytes of UTF-8
SPECIAL = 257
INVOCATION = tuple(b"!!")
TIMINGS = Timings(queue=0.5, prefill=0.25, decode=2.0, adapter_wait=0.125)

MODEL = ModelInfo(
    name="fake-model",
    base_id=BASE_ID,
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    context_length=512,
    vocab_size=260,
    eos_token_ids=frozenset({EOS}),
    default_sampling=SamplingParams(temperature=0.6, top_p=0.9),
    limits=Limits(
        max_rank=64,
        max_slots=8,
        max_running=4,
        max_waiting=16,
        max_adapter_bytes=1 << 20,
        memory_bytes=1 << 30,
        max_step_tokens=128,
    ),
    kv_capacity_tokens=400,
)


class FakeEngine:
    """Plays `plan` for each sequence; with none, the test pushes the events itself."""

    def __init__(self) -> None:
        self.submitted: list[Sequence] = []
        self.aborted: list[str] = []
        self.tiers: dict[str, Tier] = {}
        self.pins: dict[str, str] = {}  # the pinned version by name
        self.num_pin_calls = 0
        self.refuse_pins: RequestError | None = None
        self.pinning: asyncio.Event | None = None  # pins wait for it
        self.refuse: RequestError | None = None
        self.plan: Callable[[Sequence], Iterable[Event]] = lambda _: ()
        self.streams: dict[str, TokenStream] = {}
        self._news = asyncio.Event()

    def submit(self, sequence: Sequence) -> TokenStream:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(sequence)
        stream = TokenStream(sequence, 1000, lambda: 0.0, self.abort)
        self.streams[sequence.request_id] = stream
        for event in self.plan(sequence):
            stream.push(event)
        self._news.set()
        return stream

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._news.set()

    def residency(self, version: str) -> Tier:
        return self.tiers.get(version, Tier.DISK)

    async def pin(self, version: str, adapter_id: str) -> None:
        assert self.pins.get(adapter_id, version) == version, "a name has one pin"
        self.pins[adapter_id] = version
        self.num_pin_calls += 1
        if self.pinning is not None:
            await self.pinning.wait()
        if self.refuse_pins is not None:
            raise self.refuse_pins

    def unpin(self, version: str, adapter_id: str) -> None:
        assert self.pins.pop(adapter_id) == version

    def forget(self, version: str) -> None:
        raise AssertionError("the store's, not the API's")

    async def until(self, condition: Callable[[], object]) -> None:
        """Waits for a submit or an abort that makes it true."""
        while not condition():
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 10)


class FakeDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        return self._decoder.decode(bytes(i for i in token_ids if i < EOS))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class FakeTokenizer:
    """Bytes are tokens; a chat is its JSON."""

    def encode(self, text: str) -> list[int]:
        if text == "explode":
            raise ValueError(f"secret detail about {text}")
        if text == "[PAD]":
            return [1 << 20]  # a token that was added without an embedding
        return list(text.encode()) if text != "\0" else []

    def encode_chat(
        self,
        messages: Seq[Mapping[str, Any]],
        tools: list[Any] | None,
        template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> list[int]:
        chat = [messages, tools, template_kwargs, add_generation_prompt]
        return list(json.dumps(chat).encode())

    def detokenizer(self, *, continues: bool) -> FakeDetokenizer:
        return FakeDetokenizer()


class FakePublisher:
    """Judges the real config, takes any weights but "bad", and publishes to the real store.

    Weights of "dora" and "alora" are of that kind; the latter is invoked by "!!".
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def check_config(self, config_json: str) -> AdapterConfig:
        return read_config(config_json, MODEL.limits.max_rank)

    def publish(
        self, upload: Upload, config: AdapterConfig, sha256: str
    ) -> tuple[AdapterRecord, bool, Seq[str]]:
        data = upload.path.read_bytes()
        if data == b"bad":
            raise AdapterInvalidError("model.layers.0.lora_A", "is not finite")
        spec = AdapterSpec(
            modules=(),
            rank=config.rank,
            target_modules=("q_proj",),
            warnings=("a warning",),
            config_json=config.canonical_json(),
            uploaded_config_json=config.uploaded_json,
            use_dora=data == b"dora",
            invocation_tokens=INVOCATION if data == b"alora" else (),
        )
        version = version_of(sha256, config, BASE_ID)
        record, created, _ = self._store.publish(upload, version, spec, sha256)
        return record, created, spec.warnings


UPLOAD_ID = "8f14e45f-ceea-467f-a8d2-3c59d1b0f0aa"
CONFIG_JSON = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})


def header(adapter_id: str, data: bytes, /, **changes: Any) -> adapters_pb2.UploadAdapterRequest:
    """Of an upload of its own, unless `changes` say which."""
    fields: dict[str, Any] = {
        "adapter_id": adapter_id,
        "upload_id": str(uuid5(NAMESPACE_OID, f"{adapter_id} {data!r} {changes}")),
        "total_size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "adapter_config_json": CONFIG_JSON,
    }
    return adapters_pb2.UploadAdapterRequest(header=adapters_pb2.UploadHeader(**(fields | changes)))


def chunk(offset: int, data: bytes, crc: int | None = None) -> adapters_pb2.UploadAdapterRequest:
    crc = crc32(data) if crc is None else crc
    return adapters_pb2.UploadAdapterRequest(
        chunk=adapters_pb2.UploadChunk(offset=offset, data=data, crc32=crc)
    )


FINISH = adapters_pb2.UploadAdapterRequest(finish=adapters_pb2.UploadFinish())


@dataclass(frozen=True)
class Failure:
    """A call's error as a client sees it."""

    code: StatusCode
    message: str
    reason: str
    field: str | None
    metadata: Mapping[str, str]
    retry_after: float | None


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """Checks that the details are there and say what the status says."""
    metadata: Any = error.trailing_metadata()
    trailers = dict(metadata)
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found: dict[str, Any] = {}
    for packed in status.details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        found[kind.__name__] = kind.FromString(packed.value)
    info = found["ErrorInfo"]
    assert info.domain == "loraplex"
    bad, retry = found.get("BadRequest"), found.get("RetryInfo")
    return Failure(
        code=error.code(),
        message=status.message,
        reason=info.reason,
        field=bad.field_violations[0].field if bad else None,
        metadata=dict(info.metadata),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
    )


@dataclass
class Api:
    """What a scenario works with: the played engine, the real store, the server, a channel."""

    engine: FakeEngine
    store: AdapterStore
    registry: CollectorRegistry
    server: ApiServer
    target: str
    channel: Any  # grpc-stubs know half of it
    folder: Path
    another: Callable[[], ApiServer]  # not started

    def method(self, service: str, name: str) -> Any:
        """A multicallable of the service's method, by its descriptor."""
        file = inference_pb2 if service == "InferenceService" else adapters_pb2
        method = file.DESCRIPTOR.services_by_name[service].methods_by_name[name]
        shape = (
            f"{'stream' if method.client_streaming else 'unary'}_"
            f"{'stream' if method.server_streaming else 'unary'}"
        )
        return getattr(self.channel, shape)(
            f"/loraplex.v1.{service}/{name}",
            request_serializer=getattr(file, method.input_type.name).SerializeToString,
            response_deserializer=getattr(file, method.output_type.name).FromString,
        )

    def generate(self, *, timeout: float | None = 20, metadata: Any = None, **fields: Any) -> Any:
        request = inference_pb2.GenerateRequest(**fields)
        call = self.method("InferenceService", "Generate")
        return call(request, timeout=timeout, metadata=metadata)

    async def unary(self, name: str, request: Any, *, metadata: Any = None) -> Any:
        """A unary method, of whichever service has it."""
        adapters = adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].methods_by_name
        service = "AdapterService" if name in adapters else "InferenceService"
        return await self.method(service, name)(request, timeout=20, metadata=metadata)

    async def upload(self, messages: Any, *, metadata: Any = None) -> Any:
        """`messages`: an iterable or async iterable of UploadAdapterRequest."""
        call = self.method("AdapterService", "UploadAdapter")
        return await call(messages, timeout=20, metadata=metadata)

    async def publish(self, adapter_id: str, data: bytes = b"weights", **changes: Any) -> str:
        """An adapter in the store; its version."""
        messages = [header(adapter_id, data, **changes), chunk(0, data), FINISH]
        return str((await self.upload(messages)).adapter.version)

    async def get(self, adapter_id: str) -> Any:
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return (await self.unary("GetAdapter", request)).adapter

    async def delete(self, adapter_id: str) -> None:
        request = adapters_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        await self.unary("DeleteAdapter", request)

    async def pin(self, adapter_id: str, pinned: bool = True) -> Any:
        request = adapters_pb2.PinAdapterRequest(adapter_id=adapter_id, pinned=pinned)
        return (await self.unary("PinAdapter", request)).adapter

    async def upload_status(self, upload_id: str = UPLOAD_ID) -> Any:
        request = adapters_pb2.GetUploadRequest(upload_id=upload_id)
        return await self.unary("GetUpload", request)

    async def failure(self, call: Awaitable[Any]) -> Failure:
        """The error of a unary or upload call."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return failure_of(caught.value)

    async def stream_failure(self, call: AsyncIterable[Any]) -> Failure:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            _ = [event async for event in call]
        return failure_of(caught.value)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def partials(self) -> list[Path]:
        """Weights of uploads that are not published."""
        return list((self.folder / "uploads" / "default").glob("*/*.safetensors"))


Scenario = Callable[[Api], Awaitable[None]]


class Serve(Protocol):
    """Runs a scenario against a server of its own; afterwards nothing may be left running."""

    def __call__(self, scenario: Scenario, *, stall_seconds: float = ...) -> None: ...


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    folder = tmp_path / "store"

    def run(scenario: Scenario, *, stall_seconds: float = 10) -> None:
        async def main() -> None:
            async with _serving(folder, stall_seconds) as api:
                await asyncio.wait_for(scenario(api), 30)
            await _no_tasks_left()

        asyncio.run(main())

    yield run
    shutil.rmtree(folder, ignore_errors=True)


# A client that does not read stops the server's writes after some 64 KiB, not after megabytes.
_SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))


@asynccontextmanager
async def _serving(folder: Path, stall_seconds: float) -> AsyncIterator[Api]:
    store = AdapterStore.open(folder, BASE_ID, MODEL.limits.max_adapter_bytes)
    engine, registry = FakeEngine(), CollectorRegistry()
    metrics = Metrics(registry, MODEL.name)

    def build() -> ApiServer:
        return ApiServer(
            engine,
            store,
            FakePublisher(store),
            FakeTokenizer(),
            MODEL,
            metrics,
            stall_seconds=stall_seconds,
        )

    server = build()
    target = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    channel: Any = grpc.aio.insecure_channel(target, options=_SMALL_WINDOW)
    try:
        yield Api(engine, store, registry, server, target, channel, folder, build)
    finally:
        await server.drain(5)
        await channel.close()
        store.close()


async def _no_tasks_left() -> None:
    """gRPC's own tasks need a moment to see that the server has gone."""
    for _ in range(200):
        others = [task for task in asyncio.all_tasks() if not _is_ours_or_the_clients(task)]
        if not others:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"tasks left behind: {others}")


def _is_ours_or_the_clients(task: "asyncio.Task[Any]") -> bool:
    """A test's endless upload is still being read by its own side."""
    return task is asyncio.current_task() or "_consume_request_iterator" in repr(task.get_coro())


def finished(reason: FinishReason, stop_token_id: int | None = None) -> Finished:
    return Finished(reason, stop_token_id, 0, TIMINGS)


def say(text: str, *, end: FinishReason = FinishReason.LENGTH) -> list[Event]:
    """The text a byte at a time, then its end."""
    stop = EOS if end is FinishReason.STOP_TOKEN else None
    ids = [*text.encode(), *([] if stop is None else [stop])]
    return [*(Tokens((i,)) for i in ids), finished(end, stop)]
