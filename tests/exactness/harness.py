"""The product's engine in this process: scheduler, arena, pool, packed adapters, model runner."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from loraplex.adapters.packing import Layout, PackedAdapter, pack
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config
from loraplex.adapters.pool import AdapterPool
from loraplex.adapters.tiers import HostTier, Tier
from loraplex.engine.arena import Arena, Use
from loraplex.engine.engine import Engine, EngineConfig, EngineState, StepRecord
from loraplex.engine.model_runner import ModelRunner, RunnerConfig, block_shape
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import BlendPart, SamplingParams, StopParams, Tokens
from loraplex.engine.sequence import Sequence as EngineSequence
from loraplex.engine.step import Drawn, Sampled, Scheduled
from loraplex.engine.stream import TokenStream
from loraplex.errors import RequestError
from loraplex.model.decoder import Activations, Decoder, DecoderInput
from loraplex_kernels.ops import Ops
from torch import Tensor

from tests.exactness.cases import BATCH, NUM_NEW, Adapter, Blend, Folders, digest_of

CPU = torch.device("cpu")
MAX_RANK = 64
MAX_ROWS = 256
GREEDY = SamplingParams(temperature=0.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """`forced`: these tokens are taken instead of those drawn."""

    adapter: Adapter
    prompt: list[int]
    forced: list[int] | None = None
    sampling: SamplingParams = GREEDY
    max_tokens: int = NUM_NEW


@dataclass(frozen=True)
class Answer:
    """A request's tokens, and the logits of everything but the last of them."""

    tokens: list[int]
    logits: Tensor  # fp32 [len(prompt) + len(tokens) - 1, vocab]


class RecordingDecoder(Decoder):
    """A decoder that keeps the logits of every row of its last step."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config
        self.dtype = decoder.dtype
        self.last = torch.empty(0)
        self._decoder = decoder

    def forward(
        self, batch: DecoderInput, kv_cache: Tensor, ops: Ops, memory: Activations
    ) -> Tensor:
        every_row = replace(batch, logits_rows=torch.arange(len(batch.token_ids)))
        if batch.vocabulary is not None:
            updates = replace(batch.vocabulary, logits_segments=batch.vocabulary.segments)
            every_row = replace(every_row, vocabulary=updates)
        self.last = self._decoder.forward(every_row, kv_cache, ops, memory).clone()
        return self.last[batch.logits_rows]

    def chooses(self, batch: DecoderInput, ops: Ops) -> bool:
        return False


class RecordingRunner:
    """A model runner, its logits kept by request and its choices overruled where one is forced.

    Mutable: `logits`, which grow by the rows of each step.
    """

    def __init__(
        self, runner: ModelRunner, decoder: RecordingDecoder, requests: Mapping[str, Request]
    ) -> None:
        self.copy_adapter = runner.copy_adapter
        self.bind_slot = runner.bind_slot
        self.bind_blend = runner.bind_blend
        self.logits: dict[str, list[Tensor]] = {request_id: [] for request_id in requests}
        self._runner = runner
        self._decoder = decoder
        self._requests = requests

    def run(self, rows: Sequence[Scheduled]) -> list[Drawn]:
        drawn = iter(self._runner.run(rows))
        parts = torch.split(self._decoder.last, [row.num_tokens for row in rows])
        for row, logits in zip(rows, parts, strict=True):
            self.logits[row.sequence.request_id].append(logits)
        return [self._overrule(row.sequence, next(drawn)) for row in rows if row.samples]

    def _overrule(self, sequence: EngineSequence, drawn: Drawn) -> Drawn:
        forced = self._requests[sequence.request_id].forced
        return drawn if forced is None else (Sampled(forced[len(sequence.output_token_ids)]),)


class Loader:
    """Gives and copies at once, so that a run's steps are the same every time."""

    def __init__(self, packed: Mapping[str, PackedAdapter]) -> None:
        self._packed = packed

    def read(self, digest: str) -> "Future[PackedAdapter]":
        return _done(self._packed[digest])

    def run(self, work: Callable[[], None]) -> "Future[None]":
        work()
        return _done(None)


def _done(value: T) -> "Future[T]":
    future: Future[T] = Future()
    future.set_result(value)
    return future


class Steps:
    """An observer that remembers every step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.errors: list[RequestError] = []

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def on_state(self, state: EngineState) -> None: ...

    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None:
        self.errors += [error] if error is not None else []

    def on_evictions(self, tier: Tier, count: int) -> None: ...


class Harness:
    """The engine as the server builds it, anew for every run around the same model runner.

    So the arena's bytes and the tables are what earlier runs left there.
    """

    def __init__(self, decoder: Decoder, ops: Ops, folders: Folders, num_blocks: int = 448) -> None:
        self._num_blocks = num_blocks
        self._decoder = RecordingDecoder(decoder)
        self._folders = folders
        config = RunnerConfig(num_blocks, BATCH, MAX_RANK, MAX_ROWS, MAX_ROWS, CPU)
        self._runner = ModelRunner(self._decoder, ops, config)
        self._block = block_shape(decoder.config, decoder.dtype, decoder.dtype)
        self._layout = Layout(self._block.size, decoder.dtype, ops.granule_form(decoder.dtype))
        self._linears = {s.name: BaseLinear(*s) for s in decoder.config.adaptable()}
        self._base_weights = decoder.base_weight
        self._specs: dict[str, AdapterSpec] = {}  # by digest, as these
        self._packed: dict[str, PackedAdapter] = {}

    def run(
        self, requests: Sequence[Request], max_step_tokens: int = MAX_ROWS
    ) -> tuple[list[Answer], list[StepRecord]]:
        """All requests at once; each one's answer, and the record of every step."""
        for request in requests:
            for name, _ in _members(request.adapter):
                self._pack(name)
        return asyncio.run(self._run(requests, max_step_tokens))

    async def _run(
        self, requests: Sequence[Request], max_step_tokens: int
    ) -> tuple[list[Answer], list[StepRecord]]:
        named = {f"request {index}": request for index, request in enumerate(requests)}
        runner = RecordingRunner(self._runner, self._decoder, named)
        arena = Arena(self._num_blocks)
        scheduler = Scheduler(
            arena,
            AdapterPool(arena, BATCH),
            SchedulerConfig(self._block.tokens, BATCH, max_step_tokens),
        )
        steps = Steps()
        config = EngineConfig(max_live=len(named))
        host: HostTier[PackedAdapter] = HostTier(max_bytes=1 << 30)
        engine = Engine(scheduler, runner, Loader(self._packed), host, steps, config)
        streams = [engine.submit(self._sequence(*item)) for item in named.items()]
        engine.start()
        try:
            tokens = await asyncio.gather(*map(_read, streams))
        finally:
            await engine.stop()
        assert not steps.errors, "an adapter was not loaded"
        scheduler.check_integrity()
        assert arena.count(Use.KV) == 0, "KV blocks leaked"
        logits = [torch.cat(runner.logits[request_id]) for request_id in named]
        return list(map(Answer, tokens, logits)), steps.records

    def _sequence(self, request_id: str, request: Request) -> EngineSequence:
        sequence = EngineSequence(
            request_id, request.prompt, request.sampling, StopParams(request.max_tokens)
        )
        if isinstance(request.adapter, Blend):
            sequence.blend = tuple(
                BlendPart(digest_of(name), weight) for name, weight in request.adapter.members
            )
        if request.adapter is not None:
            sequence.digest = digest_of(request.adapter)
            tokens = [self._specs[version].invocation_tokens for version in sequence.versions]
            sequence.adapter_start = max(_last_start(request.prompt, list(t)) for t in tokens)
        return sequence

    def _pack(self, adapter: str) -> None:
        if digest_of(adapter) in self._packed:
            return
        folder = self._folders(adapter)
        config = read_config((folder / "adapter_config.json").read_text(), MAX_RANK)
        weights = folder / "adapter_model.safetensors"
        spec = read_adapter(weights, config, self._linears, MAX_RANK)
        self._specs[digest_of(adapter)] = spec
        self._packed[digest_of(adapter)] = pack(weights, spec, self._layout, self._base_weights)


def _members(adapter: Adapter) -> tuple[tuple[str, float], ...]:
    if isinstance(adapter, Blend):
        return adapter.members
    return () if adapter is None else ((adapter, 1.0),)


def _last_start(prompt: list[int], invocation: list[int]) -> int:
    """Where an activated adapter's tokens stand in the prompt for the last time."""
    places = range(len(prompt) - len(invocation), -1, -1)
    return (
        next(i for i in places if prompt[i : i + len(invocation)] == invocation)
        if invocation
        else 0
    )


async def _read(stream: TokenStream) -> list[int]:
    return [t async for event in stream if isinstance(event, Tokens) for t in event.token_ids]
