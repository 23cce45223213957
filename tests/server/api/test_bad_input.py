"""The contract's table of bad inputs: each gets its status, its reason and its field."""

import math
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from loraplex_protos.v1 import adapters_pb2, inference_pb2

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

INVALID = StatusCode.INVALID_ARGUMENT
NAMES = (
    *("A", "a b", ".a", "a.", "-a", "a_", "a..b", "a/b", "ä", "a" * 64, "a\n"),
    *("../x", "a\x00"),
)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"text": "x", "sampling": inference_pb2.SamplingParams(**fields)}


def stop(**fields: Any) -> dict[str, Any]:
    return {"text": "x", "stop": inference_pb2.StopParams(**fields)}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    messages = messages or (inference_pb2.ChatMessage(role="user"),)
    return {"chat": inference_pb2.Chat(messages=messages, **fields)}


def ids(*token_ids: int) -> dict[str, Any]:
    return {"token_ids": inference_pb2.TokenIds(ids=token_ids)}


def message(**fields: Any) -> Any:
    return inference_pb2.ChatMessage(**fields)


def blend(**weights: float) -> dict[str, Any]:
    members = [inference_pb2.BlendMember(adapter_id=n, weight=w) for n, w in weights.items()]
    return {"text": "x", "blend": members}


A = inference_pb2.BlendMember(adapter_id="a", weight=1.0)
DEEP = "[" * 100_000
LONG = "x" * 511

WRONG_FIELD = [
    ({}, "prompt"),
    ({"text": ""}, "text"),
    ({"text": "\0"}, "prompt"),  # the tokenizer makes nothing of it
    ({"text": "[PAD]"}, "prompt"),
    (ids(), "token_ids.ids"),
    (ids(1, 260), "token_ids.ids[1]"),
    (ids(2**32 - 1), "token_ids.ids[0]"),
    ({"chat": inference_pb2.Chat()}, "chat.messages"),
    (chat(message(role="user"), message(content="x")), "chat.messages[1].role"),
    (chat(message(role="a", tool_calls_json="{}")), "chat.messages[0].tool_calls_json"),
    (chat(tools_json="{}"), "chat.tools_json"),
    (chat(tools_json="["), "chat.tools_json"),
    (chat(tools_json=DEEP), "chat.tools_json"),
    (chat(template_kwargs_json="[]"), "chat.template_kwargs_json"),
    ({"text": "x", "request_id": "a b"}, "request_id"),
    ({"text": "x", "request_id": "a" * 65}, "request_id"),
    ({"text": "x", "request_id": "a\n"}, "request_id"),
    ({"text": "x", "adapter_version": "0" * 64}, "adapter_version"),
    ({"text": "x", "adapter_id": "a1", "adapter_version": "0" * 12}, "adapter_version"),
    ({**blend(a=1, b=1), "adapter_id": "a"}, "adapter_id"),
    ({**blend(a=1, b=1), "adapter_version": "0" * 64}, "adapter_version"),
    (blend(a=1), "blend"),
    (blend(**{f"a{n}": 1 for n in range(9)}), "blend"),
    ({"text": "x", "blend": [A, A]}, "blend[1].adapter_id"),
    (blend(a=1, A=1), "blend[1].adapter_id"),
    *((blend(a=1, b=w), "blend[1].weight") for w in (math.nan, math.inf, -math.inf, 1.1e6)),
    *(({"text": "x", "adapter_id": name}, "adapter_id") for name in NAMES),
    *(
        (sampling(**{name: value}), f"sampling.{name}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in (math.nan, math.inf, -math.inf, -0.5)
    ),
    *(
        (sampling(**{name: value}), f"sampling.{name}")
        for name in ("presence_penalty", "frequency_penalty")
        for value in (math.nan, math.inf, -2.5, 2.5)
    ),
    (sampling(top_p=0.0), "sampling.top_p"),
    (sampling(top_p=1.5), "sampling.top_p"),
    (sampling(min_p=1.5), "sampling.min_p"),
    (sampling(temperature=1e-38), "sampling.temperature"),  # a logit over it overflows float32
    (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=1e-38), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=1e30), "sampling.repetition_penalty"),
    (stop(max_tokens=0), "stop.max_tokens"),
    (stop(max_tokens=5, min_tokens=6), "stop.min_tokens"),
    (stop(min_tokens=400), "stop.min_tokens"),
    (stop(stop=["x"] * 17), "stop.stop"),
    (stop(stop=["x", ""]), "stop.stop[1]"),
    (stop(stop=["x" * 257]), "stop.stop[0]"),
    (stop(stop=["é" * 129]), "stop.stop[0]"),
    (stop(stop_token_ids=[1, 260]), "stop.stop_token_ids[1]"),
    ({"text": "x", "output": inference_pb2.OutputOptions(logprobs=21)}, "output.logprobs"),
]

OTHERS = [
    (stop(max_tokens=512), INVALID, "CONTEXT_LENGTH_EXCEEDED", "stop.max_tokens"),
    (stop(max_tokens=2**32 - 1), INVALID, "CONTEXT_LENGTH_EXCEEDED", "stop.max_tokens"),
    ({"text": LONG + "y"}, INVALID, "CONTEXT_LENGTH_EXCEEDED", "prompt"),
    (ids(*[1] * 512), INVALID, "CONTEXT_LENGTH_EXCEEDED", "token_ids.ids"),
    ({"text": LONG}, INVALID, "EXCEEDS_KV_CAPACITY", "prompt"),
    (stop(max_tokens=400), INVALID, "EXCEEDS_KV_CAPACITY", "stop.max_tokens"),
    ({"text": "x", "adapter_id": "nope"}, StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", None),
    (blend(nope=1, b=1), StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", None),
]


@pytest.mark.timeout(60)
def test_generate(serve: "Serve") -> None:
    rows = [(fields, INVALID, "INVALID_FIELD", field) for fields, field in WRONG_FIELD] + OTHERS

    async def scenario(api: "Api") -> None:
        for fields, code, reason, field in rows:
            error = await api.stream_failure(api.generate(**fields))
            found = (error.code, error.reason, error.field)
            assert found == (code, reason, field), str(fields)[:200]
            assert error.metadata["request_id"]
        assert api.engine.submitted == []
        assert api.sample("loraplex_requests_rejected_total", reason="INVALID_FIELD") == len(
            WRONG_FIELD
        )

    serve(scenario)


def test_the_limits_themselves_are_allowed(serve: "Serve") -> None:
    rows = [
        sampling(temperature=0.0, top_p=1.0, min_p=0.0, top_k=0),
        sampling(temperature=1e-9, repetition_penalty=1e-5),
        sampling(temperature=100.0, min_p=1.0, repetition_penalty=0.1, top_k=2**32 - 1),
        sampling(presence_penalty=-2.0, frequency_penalty=2.0, seed=2**64 - 1),
        stop(stop=["é" * 128] * 16, max_tokens=399, min_tokens=399),
        {"text": "x", "output": inference_pb2.OutputOptions(logprobs=20)},
        {"text": "x", "request_id": "aZ9._-" + "a" * 58},
        ids(0, 259),
    ]

    async def scenario(api: "Api") -> None:
        for fields in rows:
            call = api.generate(**fields)
            assert (await call.read()).HasField("started")
            call.cancel()
        await api.engine.until(lambda: len(api.engine.aborted) == len(rows))

    serve(scenario)


@pytest.mark.parametrize(
    ("name", "request_", "code", "reason", "field"),
    [
        ("Tokenize", inference_pb2.TokenizeRequest(), INVALID, "INVALID_FIELD", "prompt"),
        (
            "Tokenize",
            inference_pb2.TokenizeRequest(chat=inference_pb2.Chat()),
            *(INVALID, "INVALID_FIELD", "chat.messages"),
        ),
        *(
            (method, request, INVALID, "INVALID_FIELD", "adapter_id")
            for name in ("", *NAMES)
            for method, request in (
                ("GetAdapter", adapters_pb2.GetAdapterRequest(adapter_id=name)),
                ("DeleteAdapter", adapters_pb2.DeleteAdapterRequest(adapter_id=name)),
                ("PinAdapter", adapters_pb2.PinAdapterRequest(adapter_id=name)),
            )
        ),
        *(
            (
                "PinAdapter",
                adapters_pb2.PinAdapterRequest(adapter_id="nope", pinned=pinned),
                *(StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", None),
            )
            for pinned in (True, False)
        ),
        (
            "GetAdapter",
            adapters_pb2.GetAdapterRequest(adapter_id="nope"),
            *(StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", None),
        ),
        (
            "DeleteAdapter",
            adapters_pb2.DeleteAdapterRequest(adapter_id="nope"),
            *(StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", None),
        ),
        (
            "ListAdapters",
            adapters_pb2.ListAdaptersRequest(page_size=-1),
            *(INVALID, "INVALID_FIELD", "page_size"),
        ),
        *(
            (
                "ListAdapters",
                adapters_pb2.ListAdaptersRequest(page_token=token),
                *(INVALID, "INVALID_FIELD", "page_token"),
            )
            for token in ("x", "ä", "Li4=", "YQ")
        ),
        (
            "GetUpload",
            adapters_pb2.GetUploadRequest(upload_id="x"),
            *(INVALID, "INVALID_FIELD", "upload_id"),
        ),
        (
            "GetUpload",
            adapters_pb2.GetUploadRequest(upload_id="8f14e45f-ceea-467f-a8d2-3c59d1b0f0aa"),
            *(StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND", None),
        ),
    ],
)
def test_unary_methods(
    serve: "Serve", name: str, request_: Any, code: StatusCode, reason: str, field: str | None
) -> None:
    async def scenario(api: "Api") -> None:
        error = await api.failure(api.unary(name, request_))
        assert (error.code, error.reason, error.field) == (code, reason, field)

    serve(scenario)
