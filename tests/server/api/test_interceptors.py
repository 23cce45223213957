"""The boundary: strict parsing, one status for every error, nothing internal in any of them."""

import logging
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from loraplex.engine.sequence import FinishReason, Tokens
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from tests.server.api.conftest import FINISH, chunk, header, say

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

INVALID = StatusCode.INVALID_ARGUMENT
GENERATE = "/loraplex.v1.InferenceService/Generate"
UPLOAD = "/loraplex.v1.AdapterService/UploadAdapter"
GET = "/loraplex.v1.AdapterService/GetAdapter"


def with_unknown(message: Any, number: int = 99) -> bytes:
    """The message's bytes, and a varint field that no message has."""
    tag = number << 3
    encoded = bytes([tag & 0x7F | 0x80, tag >> 7]) if tag > 0x7F else bytes([tag])
    return bytes(message.SerializeToString()) + encoded + b"\x01"


def nested(number: int, inner: bytes) -> bytes:
    """Field `number`, a message of these bytes."""
    return bytes([number << 3 | 2, len(inner)]) + inner


PLAIN = inference_pb2.GenerateRequest(text="x")
MALFORMED = [b"\xff", b"\x0a\x05ab", nested(8, b"\xff"), nested(5, b"\xff\xfe")]
UNKNOWN = [
    (with_unknown(PLAIN), "99"),
    (with_unknown(PLAIN, 20), "20"),  # reserved for later
    (nested(8, with_unknown(inference_pb2.SamplingParams(seed=1))), "sampling.99"),
    (
        nested(7, nested(1, b"") + nested(1, with_unknown(inference_pb2.ChatMessage(role="a")))),
        "chat.messages[1].99",
    ),
]


def test_malformed_messages(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        for data in MALFORMED:
            error = await api.stream_failure(api.channel.unary_stream(GENERATE)(data, timeout=9))
            assert (error.code, error.reason) == (INVALID, "MALFORMED_MESSAGE")
        error = await api.failure(api.channel.unary_unary(GET)(b"\xff", timeout=9))
        assert (error.code, error.reason) == (INVALID, "MALFORMED_MESSAGE")
        for stream in ([b"\xff"], [header("a1", b"x").SerializeToString(), b"\xff"]):
            error = await api.failure(api.channel.stream_unary(UPLOAD)(stream, timeout=9))
            assert (error.code, error.reason) == (INVALID, "MALFORMED_MESSAGE")
        assert api.partials() == []

    serve(scenario)


def test_unknown_fields_at_any_depth(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        for data, field in UNKNOWN:
            error = await api.stream_failure(api.channel.unary_stream(GENERATE)(data, timeout=9))
            assert (error.code, error.reason, error.field) == (INVALID, "UNKNOWN_FIELD", field)
        data = with_unknown(adapters_pb2.GetAdapterRequest(adapter_id="a"))
        error = await api.failure(api.channel.unary_unary(GET)(data, timeout=9))
        assert (error.code, error.reason, error.field) == (INVALID, "UNKNOWN_FIELD", "99")
        stream = [header("a1", b"x").SerializeToString(), with_unknown(FINISH)]
        error = await api.failure(api.channel.stream_unary(UPLOAD)(stream, timeout=9))
        assert (error.code, error.reason, error.field) == (INVALID, "UNKNOWN_FIELD", "99")

    serve(scenario)


def test_the_metadata_must_name_the_same_adapter(serve: "Serve") -> None:
    routed = (("x-adapter-id", "a1"),)
    delete = adapters_pb2.DeleteAdapterRequest

    async def scenario(api: "Api") -> None:
        await api.upload([header("a1", b"x"), chunk(0, b"x"), FINISH], metadata=routed)
        api.engine.plan = lambda _: say("x")
        _ = [e async for e in api.generate(adapter_id="a1", text="x", metadata=routed)]
        await api.unary("ListAdapters", adapters_pb2.ListAdaptersRequest(), metadata=routed)
        tokenize = inference_pb2.TokenizeRequest(text="x")
        await api.unary("Tokenize", tokenize, metadata=routed)

        errors = [
            await api.stream_failure(api.generate(text="x", metadata=routed)),
            await api.stream_failure(api.generate(adapter_id="a2", text="x", metadata=routed)),
            await api.stream_failure(
                api.generate(adapter_id="a1", text="x", metadata=(*routed, ("x-adapter-id", "b")))
            ),
            await api.failure(api.unary("DeleteAdapter", delete(adapter_id="a2"), metadata=routed)),
            await api.failure(api.upload([header("a2", b"x")], metadata=routed)),
        ]
        for error in errors:
            assert (error.code, error.reason) == (INVALID, "INVALID_FIELD")
            assert error.field == "adapter_id"

    serve(scenario)


def test_an_unexpected_error_tells_the_client_nothing_and_the_log_everything(
    serve: "Serve", caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(api: "Api") -> None:
        errors = [
            await api.stream_failure(api.generate(request_id="r1", text="explode")),
            await api.failure(api.unary("Tokenize", inference_pb2.TokenizeRequest(text="explode"))),
        ]
        api.engine.plan = lambda _: [Tokens((97,)), 5]  # type: ignore[list-item]
        errors.append(await api.stream_failure(api.generate(request_id="r2", text="x")))
        for error in errors:
            request_id = error.metadata["request_id"]
            assert (error.code, error.reason) == (StatusCode.INTERNAL, "INTERNAL")
            assert error.message == f"internal error (request_id {request_id})"
        assert [error.metadata["request_id"] for error in errors[::2]] == ["r1", "r2"]
        assert api.engine.aborted == ["r2"]

    serve(scenario)
    logged = [r for r in caplog.records if "internal error" in r.getMessage()]
    assert len(logged) == 3
    assert "request_id=r1" in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert "secret detail" in caplog.text


def test_every_call_is_one_line_without_its_prompt(
    serve: "Serve", caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="loraplex.api")

    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("private answer", end=FinishReason.STOP_TOKEN)
        _ = [e async for e in api.generate(request_id="r1", text="private prompt")]
        await api.stream_failure(api.generate(request_id="unfit\nid", text="private prompt"))
        await api.publish("a1")

    serve(scenario)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("loraplex.api")]
    assert len(lines) == 3
    first, refused, upload = lines
    assert "request_id=r1 method=Generate code=OK" in first
    assert "adapter_id=- prompt_tokens=14 completion_tokens=15 outcome=stop_token" in first
    assert "code=InvalidArgument" in refused
    assert "reason=INVALID_FIELD" in refused
    assert "method=UploadAdapter code=OK" in upload
    assert "adapter_id=a1" in upload
    assert "private" not in caplog.text
    assert "unfit" not in caplog.text


def test_calls_are_counted_as_go_grpc_prometheus_does(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.unary("GetServerInfo", inference_pb2.GetServerInfoRequest())
        await api.failure(
            api.unary("GetAdapter", adapters_pb2.GetAdapterRequest(adapter_id="nope"))
        )
        await api.publish("a1")
        await api.server.drain(5)
        for service, method, kind, code in (
            ("InferenceService", "GetServerInfo", "unary", "OK"),
            ("AdapterService", "GetAdapter", "unary", "NotFound"),
            ("AdapterService", "UploadAdapter", "client_stream", "OK"),
        ):
            labels = {"grpc_type": kind, "grpc_method": method, "grpc_code": code}
            labels["grpc_service"] = f"loraplex.v1.{service}"
            assert api.sample("grpc_server_handled_total", **labels) == 1

    serve(scenario)
