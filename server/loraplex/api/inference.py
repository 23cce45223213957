"""InferenceService: a request in, its tokens out as they are sampled."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.api.calls import Call
from loraplex.api.completion import Completion, coalesced
from loraplex.api.protocols import EngineLike, ModelInfo, StoreLike, TokenizerLike, TokenStream
from loraplex.api.validation import (
    chat_messages,
    check_chat,
    check_generate,
    json_of,
    sampling_params,
    token_budget,
)
from loraplex.engine.sequence import (
    Finished,
    FinishReason,
    Sequence,
    StopParams,
    Timings,
    Tokens,
)
from loraplex.errors import InvalidRequestError, RequestError
from loraplex.metrics import Metrics

FEATURES: tuple[str, ...] = ()
"""What of the contract's optional parts works here, by name; GetServerInfo tells it."""

_REASONS = {
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class InferenceServicer:
    """The methods of InferenceService, behind the boundary that parses and answers errors."""

    def __init__(
        self,
        engine: EngineLike,
        store: StoreLike,
        tokenizer: TokenizerLike,
        model: ModelInfo,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._store = store
        self._tokenizer = tokenizer
        self._model = model
        self._metrics = metrics

    async def Generate(
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncIterator[pb.GenerateResponse]:
        check_generate(request, self._model)
        with self._adapter(request.adapter_id) as used:
            call.note(adapter_id=request.adapter_id or "-")
            prompt = await self._encode(request)
            sequence = self._sequence(request, call, prompt, used)
            call.note(prompt_tokens=len(prompt))
            generation = _Generation(
                sequence=sequence,
                stream=self._engine.submit(sequence),
                completion=Completion(
                    self._tokenizer.detokenizer(), sequence.stop, request.stop.stop
                ),
            )
            async with aclosing(self._stream(generation, used, call)) as responses:
                async for response in responses:
                    yield response

    async def Tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        if request.WhichOneof("prompt") is None:
            raise InvalidRequestError("prompt", "one of text and chat must be set")
        if request.HasField("chat"):
            check_chat(request.chat)
        return pb.TokenizeResponse(token_ids=await self._encode(request))

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        model, limits = self._model, self._model.limits
        return pb.GetServerInfoResponse(
            model=model.name,
            base_id=model.base_id,
            quantization=model.quantization,
            device=model.device,
            dtype=model.dtype,
            context_length=model.context_length,
            limits=pb.ServerLimits(
                max_rank=limits.max_rank,
                max_slots=limits.max_slots,
                max_running=limits.max_running,
                max_waiting=limits.max_waiting,
                max_adapter_bytes=limits.max_adapter_bytes,
                memory_bytes=limits.memory_bytes,
                max_step_tokens=limits.max_step_tokens,
            ),
            version=version("loraplex"),
            features=FEATURES,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
        )

    @contextmanager
    def _adapter(self, adapter_id: str) -> Iterator[pb.UsedAdapter | None]:
        """The version that serves the whole request, kept even if its name goes away meanwhile."""
        if not adapter_id:
            yield None
            return
        record = self._store.get(adapter_id)
        if record.state != "READY":
            raise RequestError(
                "ADAPTER_UNUSABLE", f"adapter {adapter_id} is {record.state}", field="adapter_id"
            )
        self._store.retain(record.version)
        try:
            self._store.touch(adapter_id)
            yield pb.UsedAdapter(adapter_id=adapter_id, version=record.version)
        finally:
            self._store.release(record.version)

    async def _encode(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        """The prompt's token ids. Encoding takes milliseconds to seconds: not on the loop."""
        match request.WhichOneof("prompt"):
            case "text":
                return await asyncio.to_thread(self._tokenizer.encode, request.text)
            case "chat":
                return await asyncio.to_thread(self._encode_chat, request.chat)
        assert isinstance(request, pb.GenerateRequest)
        return list(request.token_ids.ids)

    def _encode_chat(self, chat: pb.Chat) -> list[int]:
        field = "chat.tools_json"
        tools = json_of(list, chat.tools_json, field) if chat.tools_json else None
        field = "chat.template_kwargs_json"
        kwargs = (
            json_of(dict, chat.template_kwargs_json, field) if chat.template_kwargs_json else {}
        )
        prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        return self._tokenizer.encode_chat(chat_messages(chat), tools, kwargs, prompt)

    def _sequence(
        self,
        request: pb.GenerateRequest,
        call: Call,
        prompt: list[int],
        used: pb.UsedAdapter | None,
    ) -> Sequence:
        if not prompt:
            raise InvalidRequestError("prompt", "holds no token")
        eos = frozenset() if request.stop.ignore_eos else self._model.eos_token_ids
        return Sequence(
            request_id=call.request_id,
            prompt_token_ids=prompt,
            sampling=sampling_params(request.sampling, request.output, self._model),
            stop=StopParams(
                max_tokens=token_budget(request.stop, len(prompt), self._model),
                min_tokens=request.stop.min_tokens,
                stop_token_ids=eos | frozenset(request.stop.stop_token_ids),
            ),
            digest=used.version if used else None,
        )

    async def _stream(
        self, generation: "_Generation", used: pb.UsedAdapter | None, call: Call
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Started, Deltas, Finished; however it ends, the engine lets go of the sequence."""
        num_prompt = len(generation.sequence.prompt_token_ids)
        meter = self._metrics.request(num_prompt, call.started)
        outcome = "cancelled"
        try:
            yield pb.GenerateResponse(
                started=pb.Started(
                    request_id=call.request_id,
                    adapters=[used] if used else [],
                    prompt_tokens=num_prompt,
                )
            )
            async with aclosing(generation.deltas(self._engine)) as deltas:
                async for delta in deltas:
                    meter.tokens(len(delta.token_ids))
                    yield pb.GenerateResponse(delta=delta)
            assert generation.end is not None
            outcome = generation.end.reason.value
            meter.finished(generation.end.timings)
            yield pb.GenerateResponse(finished=generation.finished())
        except Exception:
            outcome = "error"
            raise
        finally:
            if generation.running:
                self._engine.abort(call.request_id)
            self._metrics.request_ended(outcome)
            call.note(completion_tokens=generation.completion.num_tokens, outcome=outcome)


@dataclass(slots=True)
class _Generation:
    """One sequence on its way out. `running`: the engine still works on it."""

    sequence: Sequence
    stream: TokenStream
    completion: Completion
    running: bool = True
    end: Finished | None = None

    async def deltas(self, engine: EngineLike) -> AsyncIterator[pb.Delta]:
        """Everything the client gets of the output; sets `end`."""
        async with aclosing(coalesced(aiter(self.stream))) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._finish(event)
                    break
                delta = self.completion.push(event)
                if self.completion.matched is not None:
                    engine.abort(self.sequence.request_id)
                    self._finish_matched()
                yield delta
                if not self.running:
                    return
        ...
