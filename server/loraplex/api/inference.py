"""InferenceService: a request in, its tokens out as they are sampled."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from importlib.metadata import version

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.adapters.store import TENANT
from loraplex.api.adaptation import Adaptation, adaptation, named_adapters
from loraplex.api.calls import Call
from loraplex.api.generation import Generation
from loraplex.api.protocols import EngineLike, ModelInfo, StoreLike, TokenizerLike
from loraplex.api.validation import (
    chat_messages,
    check_chat,
    check_generate,
    json_of,
    sampling_params,
    token_budget,
)
from loraplex.engine.sequence import Sequence, StopParams
from loraplex.errors import InvalidRequestError, RequestError
from loraplex.metrics import Metrics

FEATURES = (
    *("resume", "replace", "pin", "adapter_version", "blend", "dora", "alora"),
    *("prefix_cache", "priority", "fair_share"),
)
"""What of the contract's optional parts works here, by name; GetServerInfo tells it."""


class InferenceServicer:
    """The service's methods, behind the boundary. Mutable: `_live`, the ids of Generate calls."""

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
        self._live: set[str] = set()

    async def Generate(
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        check_generate(request, self._model)
        call.note(adapter_id=named_adapters(request) or "-")
        max_rank = self._model.limits.max_rank
        with self._claimed(call.request_id):
            async with adaptation(request, self._store, max_rank) as adapted:
                prompt = await self._encode(request)
                generation = Generation(
                    sequence=self._sequence(request, call, prompt, adapted),
                    used=adapted.used(),
                    engine=self._engine,
                    detokenizer=self._tokenizer.detokenizer(continues=not request.HasField("chat")),
                    stop_strings=request.stop.stop,
                )
                async with aclosing(generation.run(call, self._metrics)) as responses:
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
    def _claimed(self, request_id: str) -> Iterator[None]:
        """The id is this call's until the call has ended, which is later than the engine's end."""
        if request_id in self._live:
            raise RequestError(
                "REQUEST_ID_IN_USE", f"request {request_id} is still running", field="request_id"
            )
        self._live.add(request_id)
        try:
            yield
        finally:
            self._live.discard(request_id)

    async def _encode(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> list[int]:
        """The prompt's token ids; encoding takes up to seconds, so not on the loop."""
        match request.WhichOneof("prompt"):
            case "text":
                return await asyncio.to_thread(self._tokenizer.encode, request.text)
            case "chat":
                return await asyncio.to_thread(self._encode_chat, request.chat)
        assert isinstance(request, pb.GenerateRequest)
        return list(request.token_ids.ids)

    def _encode_chat(self, chat: pb.Chat) -> list[int]:
        tools = kwargs = None
        if chat.tools_json:
            tools = json_of(list, chat.tools_json, "chat.tools_json")
        if chat.template_kwargs_json:
            kwargs = json_of(dict, chat.template_kwargs_json, "chat.template_kwargs_json")
        wanted = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
        return self._tokenizer.encode_chat(chat_messages(chat), tools, kwargs, wanted)

    def _sequence(
        self,
        request: pb.GenerateRequest,
        call: Call,
        prompt: list[int],
        adapted: Adaptation,
    ) -> Sequence:
        if not prompt:
            raise InvalidRequestError("prompt", "holds no token")
        if max(prompt) >= self._model.vocab_size:  # a tokenizer may know more than the model
            raise InvalidRequestError("prompt", "holds a token that the model does not have")
        target = adapted.target(prompt)
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
            adapter_id=named_adapters(request),
            digest=target.digest,
            blend=target.blend,
            adapter_start=target.adapter_start,
            tenant=TENANT,
            priority=request.priority,
            deadline=call.deadline,
        )
