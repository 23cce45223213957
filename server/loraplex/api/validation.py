"""What a request may say, checked before anything is done with it. Pure; raises RequestError."""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.adapters.store import is_digest, validate_adapter_id
from loraplex.api.protocols import ModelInfo
from loraplex.engine.sequence import SamplingParams
from loraplex.errors import InvalidRequestError, RequestError

MAX_BLEND = 8
MAX_BLEND_WEIGHT = 1e6  # far beyond any use; a product with it does not overflow float32
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_LOGPROBS = 20

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# NaN fails every comparison, so each test is of what is allowed. The bounds that look odd are far
# beyond any use; within them no logit overflows float32, which would fail everybody's step.
_SAMPLING: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x == 0 or x >= 1e-20, "0 or at least 1e-20"),
    "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top_k": (lambda x: x >= 0, "0 or more"),
    "min_p": (lambda x: 0 <= x <= 1, "0 to 1"),
    "repetition_penalty": (lambda x: 1e-6 <= x <= 1e6, "1e-6 to 1e6"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "-2 to 2"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "-2 to 2"),
}


def is_request_id(text: str) -> bool:
    return _REQUEST_ID.fullmatch(text) is not None


def check_upload_id(upload_id: str, field: str) -> None:
    if _UUID.fullmatch(upload_id) is None:
        raise InvalidRequestError(field, "must be a UUID, as 8-4-4-4-12 hexadecimal digits")


def check_generate(request: pb.GenerateRequest, model: ModelInfo) -> None:
    """Everything that can be known before the prompt is tokenised and the adapter looked up."""
    if request.request_id and not is_request_id(request.request_id):
        raise InvalidRequestError("request_id", "must be 1 to 64 of A-Z, a-z, 0-9, '.', '_', '-'")
    _check_adapters(request)
    _check_prompt(request, model)
    _check_sampling(request.sampling)
    _check_stop(request.stop, model)
    if request.output.logprobs > MAX_LOGPROBS:
        raise InvalidRequestError("output.logprobs", f"must be at most {MAX_LOGPROBS}")


def _check_adapters(request: pb.GenerateRequest) -> None:
    if request.blend and request.adapter_id:
        raise InvalidRequestError("adapter_id", "cannot be set together with blend")
    if request.adapter_version and not request.adapter_id:
        raise InvalidRequestError("adapter_version", "needs adapter_id")
    _check_version(request.adapter_version, "adapter_version")
    if request.adapter_id:
        validate_adapter_id(request.adapter_id)
    if request.blend and not 2 <= len(request.blend) <= MAX_BLEND:
        raise InvalidRequestError("blend", f"must be 2 to {MAX_BLEND} adapters")
    names = [member.adapter_id for member in request.blend]
    for index, member in enumerate(request.blend):
        field = f"blend[{index}].adapter_id"
        validate_adapter_id(member.adapter_id, field)
        if member.adapter_id in names[:index]:
            raise InvalidRequestError(field, "is in the blend already")
        _check_version(member.adapter_version, f"blend[{index}].adapter_version")
        if not abs(member.weight) <= MAX_BLEND_WEIGHT:
            raise InvalidRequestError(
                f"blend[{index}].weight", f"must be {-MAX_BLEND_WEIGHT:g} to {MAX_BLEND_WEIGHT:g}"
            )


def _check_version(version: str, field: str) -> None:
    if version and not is_digest(version):
        raise InvalidRequestError(field, "must be a whole version: 64 of 0-9 and a-f")


def _check_prompt(request: pb.GenerateRequest, model: ModelInfo) -> None:
    match request.WhichOneof("prompt"):
        case None:
            raise InvalidRequestError("prompt", "one of text, token_ids and chat must be set")
        case "text" if not request.text:
            raise InvalidRequestError("text", "must not be empty")
        case "token_ids":
            ids = request.token_ids.ids
            if not ids:
                raise InvalidRequestError("token_ids.ids", "must not be empty")
            check_fits(len(ids), 1, model, "token_ids.ids")  # first: the list may be very long
            check_token_ids(ids, model, "token_ids.ids")
        case "chat":
            check_chat(request.chat)


def check_chat(chat: pb.Chat) -> None:
    if not chat.messages:
        raise InvalidRequestError("chat.messages", "must not be empty")
    for index, message in enumerate(chat.messages):
        if not message.role:
            raise InvalidRequestError(f"chat.messages[{index}].role", "must not be empty")


def check_token_ids(token_ids: Any, model: ModelInfo, field: str) -> None:
    for index, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            raise InvalidRequestError(
                f"{field}[{index}]", f"must be below the vocabulary's {model.vocab_size}"
            )


def _check_sampling(sampling: pb.SamplingParams) -> None:
    for name, (allowed, text) in _SAMPLING.items():
        value = getattr(sampling, name)
        if sampling.HasField(name) and not (allowed(value) and math.isfinite(value)):
            raise InvalidRequestError(f"sampling.{name}", f"must be {text}")


def _check_stop(stop: pb.StopParams, model: ModelInfo) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens == 0:
        raise InvalidRequestError("stop.max_tokens", "must be at least 1")
    if len(stop.stop) > MAX_STOPS:
        raise InvalidRequestError("stop.stop", f"must be at most {MAX_STOPS} strings")
    for index, text in enumerate(stop.stop):
        if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
            raise InvalidRequestError(
                f"stop.stop[{index}]", f"must be 1 to {MAX_STOP_BYTES} bytes of UTF-8"
            )
    check_token_ids(stop.stop_token_ids, model, "stop.stop_token_ids")


def check_fits(num_prompt: int, max_tokens: int, model: ModelInfo, field: str) -> None:
    """Prompt and output together against the context, then against what memory could ever hold."""
    total = num_prompt + max_tokens
    asked = f"{num_prompt} prompt tokens and {max_tokens} to generate"
    if total > model.context_length:
        raise RequestError(
            "CONTEXT_LENGTH_EXCEEDED",
            f"{asked} are over the context of {model.context_length}",
            field=field,
        )
    if total > model.kv_capacity_tokens:
        raise RequestError(
            "EXCEEDS_KV_CAPACITY",
            f"{asked} are over the {model.kv_capacity_tokens} that this server's memory holds",
            field=field,
        )


def token_budget(stop: pb.StopParams, num_prompt: int, model: ModelInfo) -> int:
    """How many tokens may be generated: what was asked for, else what context and memory leave."""
    if stop.HasField("max_tokens"):
        check_fits(num_prompt, stop.max_tokens, model, "stop.max_tokens")
        budget = stop.max_tokens
    else:
        check_fits(num_prompt, 1, model, "prompt")
        budget = min(model.context_length, model.kv_capacity_tokens) - num_prompt
    if stop.min_tokens > budget:
        raise InvalidRequestError(
            "stop.min_tokens", f"must be at most max_tokens, which is {budget}"
        )
    return budget


def sampling_params(
    sampling: pb.SamplingParams, output: pb.OutputOptions, model: ModelInfo
) -> SamplingParams:
    """The request's own values over the checkpoint's; a seed is drawn where none is given."""
    given = {name: getattr(sampling, name) for name in _SAMPLING if sampling.HasField(name)}
    return replace(
        model.default_sampling,
        **given,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(63),
        num_logprobs=output.logprobs if output.HasField("logprobs") else None,
    )


def chat_messages(chat: pb.Chat) -> list[dict[str, Any]]:
    """The messages as chat templates know them: absent fields are absent keys."""
    messages = []
    for index, message in enumerate(chat.messages):
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        for key in ("name", "tool_call_id"):
            if value := getattr(message, key):
                entry[key] = value
        if message.tool_calls_json:
            field = f"chat.messages[{index}].tool_calls_json"
            entry["tool_calls"] = json_of(list, message.tool_calls_json, field)
        messages.append(entry)
    return messages


def json_of(kind: type, text: str, field: str) -> Any:
    """The JSON array or object in `text`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(field, "is not JSON") from None
    if not isinstance(value, kind):
        wanted = "an array" if kind is list else "an object"
        raise InvalidRequestError(field, f"must be {wanted}")
    return value
