"""Errors to gRPC statuses with google.rpc details: the one place where that happens."""

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc import Status, StatusCode
from grpc_status import rpc_status

from loraplex.errors import REASONS, RequestError

DOMAIN = "loraplex"

# A status travels in HTTP/2 headers, twice and encoded; clients accept 8 KiB of them in all.
_MAX_MESSAGE_BYTES = 1024
_MAX_FACT_BYTES = 256


def status_of(error: RequestError, request_id: str) -> Status:
    """`error` with ErrorInfo, and BadRequest or RetryInfo where it has something to say."""
    message = clip(error.message, _MAX_MESSAGE_BYTES)
    facts = {**error.metadata, "request_id": request_id}
    facts = {key: clip(value, _MAX_FACT_BYTES) for key, value in facts.items()}
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=facts)
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clip(error.field, _MAX_FACT_BYTES), description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=error.code.value[0], message=message)
    status.details.extend(_packed(detail) for detail in details)
    return rpc_status.to_status(status)


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def clip(text: str, max_bytes: int) -> str:
    """At most so many bytes of UTF-8; what a client sent in JSON may hold lone surrogates."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= max_bytes:
        return encoded.decode()
    return encoded[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def code_label(code: StatusCode) -> str:
    """The code as Go, and so every gRPC dashboard, spells it."""
    if code is StatusCode.OK:
        return "OK"
    if code is StatusCode.CANCELLED:
        return "Canceled"
    return "".join(word.capitalize() for word in code.name.split("_"))


def errors_table() -> str:
    """`REASONS` as a Markdown table: the README's section about errors."""
    rows = (f"| `{r.name}` | {r.code.name} | {r.when} |" for r in REASONS.values())
    return "\n".join(["| reason | status | when |", "|---|---|---|", *rows]) + "\n"
