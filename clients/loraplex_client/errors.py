"""What a call can fail with, drawn as a tree: one class for each gRPC status.

    LoraplexError               message, code, reason, field, metadata, retry_after
    |-- Cancelled               the call was cancelled
    |-- UnknownError            a status that says nothing; never from this server's own code
    |-- InvalidArgument         a field is wrong: `field` names it
    |   `-- AdapterFolderError  what upload_adapter was given is no adapter; nothing was sent
    |-- DeadlineExceeded        the timeout passed, or cannot be met
    |-- NotFound                no such adapter, or not visible to this caller
    |-- AlreadyExists           the name holds other content, or the request_id is in use
    |-- PermissionDenied        a valid token that may not do this
    |-- ResourceExhausted       a queue, a quota, a disk or memory is full: see `retry_after`
    |-- FailedPrecondition      the adapter is there but cannot be used, or has another version
    |-- Aborted                 an upload overtaken or left unfinished, a reader that stalled
    |-- OutOfRange              an upload went on from the wrong offset
    |-- Unimplemented           this version of the server does not serve that
    |-- InternalError           the server's fault
    |-- Unavailable             draining, restarting, or the connection broke: try again
    |   `-- ServerUnreachable   no connection was ever made
    |-- DataLoss                bytes were damaged on the way
    `-- Unauthenticated         no token, or a bad one

`reason` is `google.rpc.ErrorInfo.reason` (None when the status did not come from the server's own
code), `retry_after` seconds until a retry makes sense, when the server said so.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import (  # type: ignore[import-untyped, unused-ignore]
    error_details_pb2,
    status_pb2,
)
from grpc import StatusCode
from grpc_status import rpc_status

DOMAIN = "loraplex"


class LoraplexError(Exception):
    """Base of everything a call can fail with."""

    code: ClassVar[StatusCode] = StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})


class Cancelled(LoraplexError):
    code = StatusCode.CANCELLED


class UnknownError(LoraplexError):
    code = StatusCode.UNKNOWN


class InvalidArgument(LoraplexError):
    code = StatusCode.INVALID_ARGUMENT


class AdapterFolderError(InvalidArgument):
    """A folder that holds no adapter this client can send; found before anything was sent."""


class DeadlineExceeded(LoraplexError):
    code = StatusCode.DEADLINE_EXCEEDED


class NotFound(LoraplexError):
    code = StatusCode.NOT_FOUND


class AlreadyExists(LoraplexError):
    code = StatusCode.ALREADY_EXISTS


class PermissionDenied(LoraplexError):
    code = StatusCode.PERMISSION_DENIED


class ResourceExhausted(LoraplexError):
    code = StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(LoraplexError):
    code = StatusCode.FAILED_PRECONDITION


class Aborted(LoraplexError):
    code = StatusCode.ABORTED


class OutOfRange(LoraplexError):
    code = StatusCode.OUT_OF_RANGE


class Unimplemented(LoraplexError):
    code = StatusCode.UNIMPLEMENTED


class InternalError(LoraplexError):
    code = StatusCode.INTERNAL


class Unavailable(LoraplexError):
    code = StatusCode.UNAVAILABLE


class ServerUnreachable(Unavailable):
    """No connection was made: nothing listens there, or it is no gRPC server."""


class DataLoss(LoraplexError):
    code = StatusCode.DATA_LOSS


class Unauthenticated(LoraplexError):
    code = StatusCode.UNAUTHENTICATED


_BY_CODE: Mapping[StatusCode, type[LoraplexError]] = {
    cls.code: cls for cls in LoraplexError.__subclasses__()
}


def from_rpc_error(error: grpc.RpcError, target: str, num_tokens: int = 0) -> LoraplexError:
    """The error of a failed call to `target`; sync and async calls fail with the same shape.

    `num_tokens` had come of its answer.
    """
    call = cast(grpc.Call, error)
    code, details, status = call.code(), call.details() or "", _rich_status(call)
    if status is None and code is StatusCode.DEADLINE_EXCEEDED and num_tokens:
        return DeadlineExceeded(f"stopped by the timeout after {num_tokens} tokens")
    if status is None:
        return _from_transport(code, details, target)
    facts = _facts(status)
    message, field = details or _words(code), facts.get("field")
    if field is not None and field not in message:
        message = f"{field}: {message}"
    return _BY_CODE[code](message, **facts)


def _rich_status(call: grpc.Call) -> status_pb2.Status | None:
    """grpc-status-details-bin, unless it is absent, unreadable or contradicts the status."""
    try:
        return cast(status_pb2.Status | None, rpc_status.from_call(call))
    except (ValueError, DecodeError):
        return None


def _facts(status: status_pb2.Status) -> dict[str, Any]:
    """What a rich status says beside its message, as LoraplexError's keywords."""
    facts: dict[str, Any] = {}
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            facts |= {"reason": info.reason, "metadata": info.metadata}
        elif detail.Unpack(retry):
            facts["retry_after"] = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Unpack(bad) and bad.field_violations:
            facts["field"] = bad.field_violations[0].field or None
    return facts


_NEVER_CONNECTED = re.compile(
    r"failed to connect to all addresses|errors? resolving|DNS resolution"
)
_NOBODY_THERE = re.compile(r"connection refused|no such file", re.IGNORECASE)


def _from_transport(code: StatusCode, details: str, target: str) -> LoraplexError:
    """A status that gRPC itself, a proxy or some other server made: its words need a frame."""
    if code is StatusCode.UNAVAILABLE:
        if not _NEVER_CONNECTED.search(details):
            return Unavailable(f"the connection to {target} failed: {details}")
        if _NOBODY_THERE.search(details):
            return ServerUnreachable(f"no server at {target}")
        return ServerUnreachable(f"cannot reach {target}: {_last_error(details)}")
    if code is StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"no answer from {target} within the timeout")
    message = f"{_words(code)}: {details}" if details else _words(code)
    return _BY_CODE[code](message)


def _last_error(details: str) -> str:
    """`..last error: UNKNOWN: ipv4:127.0.0.1:1: why` -> `why`."""
    error = re.sub(r"^.*last error: \w+: (\S+: )?", "", details)
    # Of the TLS library's words those that say something.
    return re.sub(
        r"^Tls handshake failed.*:([A-Z_]+.*?)(: OK)?$", r"TLS handshake failed: \1", error
    )


def _words(code: StatusCode) -> str:
    return code.name.lower().replace("_", " ")
