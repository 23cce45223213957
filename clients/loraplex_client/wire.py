"""Between Python and protobuf: requests out, values in. Pure; both clients stand on it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message as Protobuf
from google.protobuf.timestamp_pb2 import Timestamp
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from loraplex_client.errors import InternalError
from loraplex_client.values import (
    Adapter,
    AdapterState,
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    Residency,
    ServerInfo,
    ServerLimits,
    Started,
    Timings,
    TokenLogprobs,
    TopLogprob,
    UploadResult,
    UploadState,
    UploadStatus,
    Usage,
    UsedAdapter,
    Visibility,
)

_M = TypeVar("_M", bound=Protobuf)

Message = Mapping[str, object]
"""One turn of a chat: role, content, and optionally name, tool_call_id, tool_calls."""


class ChatOptions(TypedDict, total=False):
    """How a chat is rendered through the model's template; only beside `messages`.

    tools                   definitions of tools, as the template takes them
    template_kwargs         further variables for the template
    add_generation_prompt   end with the head of the assistant's turn; unset: yes
    """

    tools: Sequence[Mapping[str, object]] | None
    template_kwargs: Mapping[str, object] | None
    add_generation_prompt: bool | None


class GenerateOptions(ChatOptions, total=False):
    """Every further keyword of `stream` and `complete`, by its proto name; None is "not set".

    The call:
    request_id              1 to 64 of [A-Za-z0-9._-]; unset: the server makes one
    adapter_version         fail unless this is the adapter's version now
    blend                   2 to 8 adapters and their weights, instead of adapter_id
    priority                where requests wait, the higher goes first; unset: 0

    How tokens are drawn; unset: as the model's own generation_config.json says:
    temperature             0: always the most likely token
    top_p                   in (0, 1]: only the most likely tokens that together hold so much
    top_k                   only so many most likely tokens; 0: all
    min_p                   in [0, 1]: only tokens at least so many times as likely as the likeliest
    repetition_penalty      over prompt and answer, in [1e-6, 1e6]; 1: none
    presence_penalty        once for a token that the answer has, in [-2, 2]; 0: none
    frequency_penalty       for each time that the answer has it, in [-2, 2]; 0: none
    seed                    0 to 2^64 - 1: the same gives the same answer; unset: a random one

    How long:
    max_tokens              tokens, at least 1; unset: what the context leaves
    min_tokens              tokens before which nothing stops the answer
    stop                    the answer ends before this text, or one of up to 16; 256 bytes each
    stop_token_ids          the answer ends with such a token
    ignore_eos              go on past the model's own end of text

    logprobs                for each token its log probability and so many likeliest ones', 0 to 20;
                            unset: none

    The chat: see ChatOptions.
    """

    request_id: str | None
    adapter_version: str | None
    blend: Mapping[str, float] | None  # weights by adapter_id, instead of one adapter
    priority: int | None

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None

    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None

    logprobs: int | None


def _fields(message: Any) -> frozenset[str]:
    return frozenset(message.DESCRIPTOR.fields_by_name)


_CALL_FIELDS = frozenset({"request_id", "adapter_version", "blend", "priority"})
_CHAT_FIELDS = frozenset(ChatOptions.__annotations__)
_PARTS: Mapping[str, Any] = {
    "sampling": inference_pb2.SamplingParams,
    "stop": inference_pb2.StopParams,
    "output": inference_pb2.OutputOptions,
}
OPTIONS = _CALL_FIELDS | _CHAT_FIELDS | frozenset().union(*map(_fields, _PARTS.values()))


def metadata(token: str | None, adapter_id: str = "") -> tuple[tuple[str, str], ...]:
    """What travels beside a call. An id that no header holds is left for the server to refuse."""
    pairs = []
    if token is not None:
        pairs.append(("authorization", f"Bearer {token}"))
    if adapter_id and adapter_id.isascii() and adapter_id.isprintable():
        pairs.append(("x-adapter-id", adapter_id))
    return tuple(pairs)


def generate_request(
    prompt: str | None,
    adapter_id: str,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    options: Mapping[str, object],
) -> inference_pb2.GenerateRequest:
    """A request of exactly one of prompt, messages and token_ids; TypeError for a wrong keyword."""
    _refuse_unknown(options, OPTIONS)
    chosen = _set_only(options)
    if isinstance(chosen.get("stop"), str):
        chosen["stop"] = [chosen["stop"]]
    if "blend" in chosen:
        chosen["blend"] = _blend(chosen["blend"])
    parts = {name: _take(chosen, _fields(part)) for name, part in _PARTS.items()}
    return _made(
        inference_pb2.GenerateRequest,
        adapter_id=adapter_id,
        **_prompt_fields(prompt, messages, token_ids, _take(chosen, _CHAT_FIELDS)),
        **{name: _made(_PARTS[name], **fields) for name, fields in parts.items() if fields},
        **_take(chosen, _CALL_FIELDS),
    )


def _made(kind: type[_M], **fields: Any) -> _M:
    """`kind(**fields)`, but a TypeError or ValueError names the field."""
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except UnicodeError:
            raise
        except (TypeError, ValueError) as error:
            wrong = TypeError if isinstance(error, TypeError) else ValueError
            raise wrong(f"{name}: {error}") from None
    return message


def _blend(weights: Mapping[str, float]) -> list[dict[str, object]]:
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError("'blend' names no adapter")
    return [{"adapter_id": adapter_id, "weight": weight} for adapter_id, weight in weights.items()]


def tokenize_request(
    prompt: str | None, messages: Sequence[Message] | None, options: Mapping[str, object]
) -> inference_pb2.TokenizeRequest:
    _refuse_unknown(options, _CHAT_FIELDS)
    return inference_pb2.TokenizeRequest(
        **_prompt_fields(prompt, messages, None, _set_only(options))
    )


def _refuse_unknown(options: Mapping[str, object], known: frozenset[str]) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; there are: {', '.join(sorted(known))}")


def _set_only(options: Mapping[str, object]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _take(options: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _prompt_fields(
    prompt: str | None,
    messages: Sequence[Message] | None,
    token_ids: Sequence[int] | None,
    chat_options: Mapping[str, Any],
) -> dict[str, Any]:
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise TypeError("exactly one prompt is needed: a text, messages= or token_ids=")
    if messages is None and chat_options:
        raise TypeError(f"{min(chat_options)!r} needs messages=")
    if messages is not None:
        return {"chat": _chat(messages, chat_options)}
    if token_ids is not None:
        return {"token_ids": {"ids": token_ids}}
    return {"text": prompt}


def _chat(messages: Sequence[Message], options: Mapping[str, Any]) -> inference_pb2.Chat:
    chat = inference_pb2.Chat(
        messages=[_chat_message(message) for message in messages],
        tools_json=_json(options.get("tools")),
        template_kwargs_json=_json(options.get("template_kwargs")),
    )
    if "add_generation_prompt" in options:
        chat.add_generation_prompt = options["add_generation_prompt"]
    return chat


_MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", "tool_calls"})


def _chat_message(message: Message) -> inference_pb2.ChatMessage:
    unknown = sorted(message.keys() - _MESSAGE_KEYS)
    if unknown:
        raise TypeError(f"unknown key {unknown[0]!r} in a chat message")
    fields: dict[str, Any] = _set_only(message)
    calls = fields.pop("tool_calls", None)
    return _made(inference_pb2.ChatMessage, **fields, tool_calls_json=_json(calls))


def _json(value: object) -> str:
    return "" if value is None else json.dumps(value)


def event_of(response: inference_pb2.GenerateResponse) -> Event | None:
    """None: an event this version of the client does not know."""
    match response.WhichOneof("event"):
        case "started":
            return _started(response.started)
        case "delta":
            return _delta(response.delta)
        case "finished":
            return _finished(response.finished)
        case _:
            return None


def _started(started: inference_pb2.Started) -> Started:
    return Started(
        request_id=started.request_id,
        adapters=tuple(UsedAdapter(used.adapter_id, used.version) for used in started.adapters),
        prompt_tokens=started.prompt_tokens,
        cached_tokens=started.cached_tokens,
    )


def _delta(delta: inference_pb2.Delta) -> Delta:
    return Delta(
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=tuple(
            TokenLogprobs(
                entry.logprob, tuple(TopLogprob(top.token_id, top.logprob) for top in entry.top)
            )
            for entry in delta.logprobs
        ),
    )


def _finished(finished: inference_pb2.Finished) -> Finished:
    usage, timings, match = finished.usage, finished.timings, finished.stop_match
    which = match.WhichOneof("match")
    return Finished(
        finish_reason=_enum(FinishReason, inference_pb2.FinishReason, finished.finish_reason),
        stop_match=None if which is None else getattr(match, which),
        usage=Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        timings=Timings(timings.queue, timings.prefill, timings.decode, timings.adapter_wait),
    )


def completion_of(events: Iterable[Event]) -> Completion:
    """All events of one stream, put together."""
    events = list(events)
    deltas = [event for event in events if isinstance(event, Delta)]
    started = next((event for event in events if isinstance(event, Started)), Started(""))
    finished = events[-1] if events else None
    if not isinstance(finished, Finished):
        raise InternalError("the stream ended before its last event")
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=finished.finish_reason,
        usage=finished.usage,
        timings=finished.timings,
        adapters=started.adapters,
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        stop_match=finished.stop_match,
        request_id=started.request_id,
    )


def adapter_of(adapter: adapters_pb2.Adapter) -> Adapter:
    return Adapter(
        adapter_id=adapter.adapter_id,
        version=adapter.version,
        etag=adapter.etag,
        size_bytes=adapter.size_bytes,
        rank=adapter.rank,
        target_modules=tuple(adapter.target_modules),
        state=_enum(AdapterState, adapters_pb2.AdapterState, adapter.state),
        residency=_enum(Residency, adapters_pb2.AdapterResidency, adapter.residency),
        pinned=adapter.pinned,
        visibility=_enum(Visibility, adapters_pb2.AdapterVisibility, adapter.visibility),
        create_time=_time(adapter.create_time) if adapter.HasField("create_time") else None,
        last_used_time=(
            _time(adapter.last_used_time) if adapter.HasField("last_used_time") else None
        ),
        owner=adapter.owner,
        references=adapter.references,
    )


def upload_result_of(response: adapters_pb2.UploadAdapterResponse) -> UploadResult:
    return UploadResult(adapter_of(response.adapter), response.created, tuple(response.warnings))


def upload_status_of(response: adapters_pb2.GetUploadResponse) -> UploadStatus:
    return UploadStatus(
        state=_enum(UploadState, adapters_pb2.UploadState, response.state),
        committed_size=response.committed_size,
        expire_time=_time(response.expire_time) if response.HasField("expire_time") else None,
        adapter=adapter_of(response.adapter) if response.HasField("adapter") else None,
    )


def server_info_of(info: inference_pb2.GetServerInfoResponse) -> ServerInfo:
    limits = info.limits
    return ServerInfo(
        model=info.model,
        base_id=info.base_id,
        architecture=info.architecture,
        quantization=info.quantization,
        device=info.device,
        dtype=info.dtype,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        limits=ServerLimits(
            max_rank=limits.max_rank,
            max_slots=limits.max_slots,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            max_adapter_bytes=limits.max_adapter_bytes,
            memory_bytes=limits.memory_bytes,
            max_step_tokens=limits.max_step_tokens,
        ),
        version=info.version,
        features=tuple(info.features),
    )


def _time(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


_E = TypeVar("_E", bound=StrEnum)


def _enum(ours: type[_E], theirs: Any, number: int) -> _E:
    """FINISH_REASON_LENGTH -> FinishReason.LENGTH; what we do not know is UNKNOWN."""
    names: Mapping[int, str] = {value: name for name, value in theirs.items()}
    name = names.get(number, "")
    return next((member for member in ours if name.endswith(f"_{member.name}")), ours("unknown"))
