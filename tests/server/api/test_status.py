"""Errors as rich statuses that fit into headers, and the table made of them."""

import pytest
from google.rpc import (  # type: ignore[import-untyped, unused-ignore]
    error_details_pb2,
    status_pb2,
)
from grpc import StatusCode
from loraplex.api.status import clip, code_label, errors_table, status_of
from loraplex.errors import REASONS, AdapterInvalidError, RequestError


def test_details_fit_the_headers_whatever_a_client_made_us_say() -> None:
    error = AdapterInvalidError("ä\ud800" * 50_000, "is refused " + "\N{SNOWMAN}" * 50_000)
    error.metadata["key"] = "\n" * 50_000
    status = status_of(error, "r" * 64)
    details = status.trailing_metadata[0][1]
    # The message is percent-encoded, at worst three for one, and the details are base64.
    assert 3 * len(status.details.encode()) + len(details) * 4 / 3 < 8000
    assert status_pb2.Status.FromString(details).message == status.details


def test_details_say_what_the_error_says() -> None:
    error = RequestError("QUEUE_FULL", "full", field="f", retry_after=0.25, metadata={"a": "b"})
    status = status_pb2.Status.FromString(status_of(error, "r1").trailing_metadata[0][1])
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for packed, detail in zip(status.details, (info, bad, retry), strict=True):
        assert packed.Unpack(detail)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "loraplex")
    assert dict(info.metadata) == {"a": "b", "request_id": "r1"}
    assert bad.field_violations[0].field == "f"
    assert retry.retry_delay.ToMilliseconds() == 250


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("x" * 10, "x" * 10),
        ("x" * 11, "x" * 7 + "..."),
        ("é" * 6, "é" * 3 + "..."),  # never half a code point
        ("a\ud800b", "a?b"),
    ],
)
def test_clip(text: str, expected: str) -> None:
    assert clip(text, 10) == expected


def test_code_labels_are_gos() -> None:
    assert {code.name: code_label(code) for code in StatusCode} == {
        "OK": "OK",
        "CANCELLED": "Canceled",
        "UNKNOWN": "Unknown",
        "INVALID_ARGUMENT": "InvalidArgument",
        "DEADLINE_EXCEEDED": "DeadlineExceeded",
        "NOT_FOUND": "NotFound",
        "ALREADY_EXISTS": "AlreadyExists",
        "PERMISSION_DENIED": "PermissionDenied",
        "RESOURCE_EXHAUSTED": "ResourceExhausted",
        "FAILED_PRECONDITION": "FailedPrecondition",
        "ABORTED": "Aborted",
        "OUT_OF_RANGE": "OutOfRange",
        "UNIMPLEMENTED": "Unimplemented",
        "INTERNAL": "Internal",
        "UNAVAILABLE": "Unavailable",
        "DATA_LOSS": "DataLoss",
        "UNAUTHENTICATED": "Unauthenticated",
    }


def test_the_table_has_a_row_for_every_reason() -> None:
    rows = errors_table().splitlines()[2:]
    assert len(rows) == len(REASONS)
    for row, reason in zip(rows, REASONS.values(), strict=True):
        assert row == f"| `{reason.name}` | {reason.code.name} | {reason.when} |"
        assert row.count("|") == 4
