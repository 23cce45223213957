"""Everything the server answers with, drawn as a tree; each error carries its gRPC code.

    LoraplexError                    a message for a person, a reason for a program
    |-- StartupError                 the server cannot start: one line on stderr, exit 1
    |   `-- ModelError               the base model cannot be found, read or served
    `-- RequestError                 one call failed: `reason` names a row of REASONS
        |-- InvalidRequestError      a field of the request is wrong; names it
        `-- AdapterInvalidError      an uploaded adapter is refused; names the tensor or key

`REASONS` is the contract's table: what `google.rpc.ErrorInfo.reason` may hold, with which status,
and when.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from grpc import StatusCode


@dataclass(frozen=True, slots=True)
class Reason:
    """One row of the contract: a machine-readable reason, its gRPC status, and when it is given."""

    name: str
    code: StatusCode
    when: str


_TABLE = (
    Reason(
        "MALFORMED_MESSAGE",
        StatusCode.INVALID_ARGUMENT,
        "the bytes are not a protobuf message of the method's type, or hold bad UTF-8",
    ),
    Reason(
        "UNKNOWN_FIELD",
        StatusCode.INVALID_ARGUMENT,
        "a field number that this server does not know",
    ),
    Reason(
        "INVALID_FIELD",
        StatusCode.INVALID_ARGUMENT,
        "a field is missing, out of range or contradicts another; BadRequest names it",
    ),
    Reason(
        "CONTEXT_LENGTH_EXCEEDED",
        StatusCode.INVALID_ARGUMENT,
        "prompt and max_tokens together are longer than the model's context",
    ),
    Reason(
        "EXCEEDS_KV_CAPACITY",
        StatusCode.INVALID_ARGUMENT,
        "the request could never fit the memory for KV and adapters (--memory)",
    ),
    Reason(
        "UPLOAD_OUT_OF_ORDER",
        StatusCode.INVALID_ARGUMENT,
        "upload messages that are not one header, chunks, one finish",
    ),
    Reason(
        "ADAPTER_INVALID",
        StatusCode.INVALID_ARGUMENT,
        "the adapter is not one this server computes exactly; names the tensor or key",
    ),
    Reason(
        "ADAPTER_TOO_LARGE",
        StatusCode.INVALID_ARGUMENT,
        "the declared size is over the server's limit",
    ),
    Reason(
        "ADAPTER_NOT_FOUND",
        StatusCode.NOT_FOUND,
        "no such adapter, or not visible to the caller",
    ),
    Reason("UPLOAD_NOT_FOUND", StatusCode.NOT_FOUND, "no such upload of the caller's"),
    Reason(
        "ADAPTER_UNUSABLE",
        StatusCode.FAILED_PRECONDITION,
        "the adapter is quarantined, of another base model, or of a rank over this server's",
    ),
    Reason(
        "VERSION_MISMATCH",
        StatusCode.FAILED_PRECONDITION,
        "the name's current version is not adapter_version",
    ),
    Reason(
        "REQUEST_ID_IN_USE",
        StatusCode.ALREADY_EXISTS,
        "a request with this request_id is still running",
    ),
    Reason(
        "ADAPTER_EXISTS",
        StatusCode.ALREADY_EXISTS,
        "the name holds other content, and neither replace nor an etag was given",
    ),
    Reason(
        "QUEUE_FULL",
        StatusCode.RESOURCE_EXHAUSTED,
        "too many requests wait, or too many of one adapter's; RetryInfo says when to retry",
    ),
    Reason(
        "OUT_OF_MEMORY",
        StatusCode.RESOURCE_EXHAUSTED,
        "KV and adapters in use, or pinned, leave no room to go on",
    ),
    Reason(
        "PINS_EXCEED_MEMORY",
        StatusCode.RESOURCE_EXHAUSTED,
        "the pinned adapters would take more than half of the memory, or of the slots",
    ),
    Reason("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED, "the store has no room for the upload"),
    Reason("DEADLINE_EXCEEDED", StatusCode.DEADLINE_EXCEEDED, "the call's deadline has passed"),
    Reason(
        "DEADLINE_UNREACHABLE",
        StatusCode.DEADLINE_EXCEEDED,
        "the wait for a first token would be longer than the call's deadline leaves",
    ),
    Reason("UPLOAD_STALLED", StatusCode.DEADLINE_EXCEEDED, "no upload message for 30 seconds"),
    Reason(
        "UPLOAD_INCOMPLETE",
        StatusCode.ABORTED,
        "the upload's stream ended without UploadFinish; what came is kept for resume",
    ),
    Reason(
        "UPLOAD_IN_PROGRESS",
        StatusCode.ABORTED,
        "another upload to this adapter_id is under way",
    ),
    Reason(
        "UPLOAD_TAKEN_OVER",
        StatusCode.ABORTED,
        "another stream goes on with this upload_id",
    ),
    Reason(
        "ETAG_MISMATCH",
        StatusCode.ABORTED,
        "the name does not carry if_match_etag: it was published anew, or does not exist",
    ),
    Reason("SLOW_READER", StatusCode.ABORTED, "the client stopped reading its stream for too long"),
    Reason(
        "OFFSET_MISMATCH",
        StatusCode.OUT_OF_RANGE,
        "a chunk's or resume's offset is not committed_size",
    ),
    Reason("CRC32_MISMATCH", StatusCode.DATA_LOSS, "a chunk's bytes do not match its crc32"),
    Reason(
        "SHA256_MISMATCH",
        StatusCode.DATA_LOSS,
        "the whole upload does not match its sha256; it was discarded",
    ),
    Reason("DRAINING", StatusCode.UNAVAILABLE, "the server is shutting down"),
    Reason(
        "STORE_UNAVAILABLE", StatusCode.UNAVAILABLE, "the adapter store cannot be written or read"
    ),
    Reason(
        "NOT_IMPLEMENTED",
        StatusCode.UNIMPLEMENTED,
        "a call or field of the contract that this version does not serve yet",
    ),
    Reason(
        "NAN_LOGITS", StatusCode.INTERNAL, "the model's output is not finite; names the adapter"
    ),
    Reason("INTERNAL", StatusCode.INTERNAL, "anything unexpected; the log has the request id"),
)

REASONS: Mapping[str, Reason] = {reason.name: reason for reason in _TABLE}


class LoraplexError(Exception):
    """Base of every error that is the user's or the world's fault."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class StartupError(LoraplexError):
    """The server cannot start; the message is the one line the user sees."""


class ModelError(StartupError):
    """The base model cannot be found, read or served."""


class RequestError(LoraplexError):
    """One call failed for a reason of `REASONS`.

    `field` is the request's field that is wrong, `retry_after` seconds until a retry makes sense,
    `metadata` further facts by name.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = REASONS[reason]
        self.field = field
        self.retry_after = retry_after
        self.metadata = dict(metadata or {})

    @property
    def code(self) -> StatusCode:
        return self.reason.code


class InvalidRequestError(RequestError):
    """A field of a request is missing, out of range or contradicts another."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__("INVALID_FIELD", message, field=field)


class AdapterInvalidError(RequestError):
    """An uploaded adapter is refused; `key` is the tensor's name or the config's key."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__("ADAPTER_INVALID", f"{key}: {message}", field=key)


def not_implemented(what: str) -> RequestError:
    """`what` is a call or a field that this version of the server does not serve."""
    return RequestError("NOT_IMPLEMENTED", f"{what} is not served by this version", field=what)
