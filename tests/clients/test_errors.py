"""Statuses to errors: every code has its class, rich details are read, bad ones do no harm."""

from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import (  # type: ignore[import-untyped, unused-ignore]
    error_details_pb2,
    status_pb2,
)
from grpc import StatusCode
from loraplex_client import errors
from loraplex_client.errors import LoraplexError, from_rpc_error

_FAILURES = [code for code in StatusCode if code is not StatusCode.OK]


class FailedCall(grpc.RpcError):
    """What gRPC raises, as far as this client reads it."""

    def __init__(self, code: StatusCode, details: str, trailing: Any = ()) -> None:
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def rich(code: StatusCode, message: str, *details: Any) -> FailedCall:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return FailedCall(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


@pytest.mark.parametrize("code", _FAILURES)
def test_every_code_has_a_class_of_its_own(code: StatusCode) -> None:
    error = from_rpc_error(rich(code, "why"), "host:1")
    assert type(error) is not LoraplexError
    assert error.code is code
    assert str(error) == "why"
    assert (error.reason, error.retry_after, error.field) == (None, None, None)


def test_the_tree_in_the_docstring_names_every_class() -> None:
    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, LoraplexError):
            assert name in tree


def test_details_are_read() -> None:
    error = from_rpc_error(
        rich(
            StatusCode.RESOURCE_EXHAUSTED,
            "too many requests wait",
            error_details_pb2.ErrorInfo(
                reason="QUEUE_FULL", domain="loraplex", metadata={"waiting": "9"}
            ),
            error_details_pb2.RetryInfo(
                retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)
            ),
        ),
        "host:1",
    )
    assert isinstance(error, errors.ResourceExhausted)
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after == 1.5
    assert error.metadata == {"waiting": "9"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("must be at least 0", "temperature: must be at least 0"),
        ("temperature must be at least 0", "temperature must be at least 0"),
    ],
)
def test_the_message_names_the_field_once(message: str, expected: str) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="temperature")
    error = from_rpc_error(
        rich(
            StatusCode.INVALID_ARGUMENT,
            message,
            error_details_pb2.BadRequest(field_violations=[violation]),
        ),
        "host:1",
    )
    assert (error.field, str(error)) == ("temperature", expected)


def test_a_reason_of_another_domain_is_not_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere")
    assert from_rpc_error(rich(StatusCode.ABORTED, "why", info), "host:1").reason is None


@pytest.mark.parametrize(
    "trailing",
    [
        None,
        (("grpc-status-details-bin", b"\xff\xff"),),
        (("grpc-status-details-bin", status_pb2.Status(code=3).SerializeToString()),),
    ],
    ids=["none", "unreadable", "contradicting"],
)
def test_details_that_cannot_be_trusted_are_left_out(trailing: Any) -> None:
    error = from_rpc_error(FailedCall(StatusCode.NOT_FOUND, "gone", trailing), "host:1")
    assert isinstance(error, errors.NotFound)
    assert str(error) == "not found: gone"


@pytest.mark.parametrize(
    ("code", "details", "kind", "message"),
    [
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: Connection refused",
            errors.ServerUnreachable,
            "no server at host:1",
        ),
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: "
            "Socket closed",
            errors.ServerUnreachable,
            "cannot reach host:1: Socket closed",
        ),
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls "
            "handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL "
            "routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: self signed certificate: OK",
            errors.ServerUnreachable,
            "cannot reach host:1: TLS handshake failed: CERTIFICATE_VERIFY_FAILED: "
            "self signed certificate",
        ),
        (
            StatusCode.UNAVAILABLE,
            "errors resolving host:1: [field:hostname lookup error: Domain name not found]",
            errors.ServerUnreachable,
            "cannot reach host:1: errors resolving host:1: "
            "[field:hostname lookup error: Domain name not found]",
        ),
        (
            StatusCode.UNAVAILABLE,
            "Socket closed",
            errors.Unavailable,
            "the connection to host:1 failed: Socket closed",
        ),
        (
            StatusCode.DEADLINE_EXCEEDED,
            "Deadline Exceeded",
            errors.DeadlineExceeded,
            "no answer from host:1 within the timeout",
        ),
        (
            StatusCode.UNIMPLEMENTED,
            "Method not found!",
            errors.Unimplemented,
            "unimplemented: Method not found!",
        ),
        (StatusCode.UNKNOWN, "", errors.UnknownError, "unknown"),
    ],
)
def test_what_grpc_itself_says_is_put_in_words(
    code: StatusCode, details: str, kind: type[LoraplexError], message: str
) -> None:
    error = from_rpc_error(FailedCall(code, details), "host:1")
    assert type(error) is kind
    assert str(error) == message


def test_a_timeout_in_the_midst_of_an_answer_says_so() -> None:
    late = FailedCall(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert str(from_rpc_error(late, "host:1", 12)) == "stopped by the timeout after 12 tokens"
