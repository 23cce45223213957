"""What the client hands back: frozen values, no protobuf in sight."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a completion ended by itself; a cancelled, late or failed one raises instead."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    UNKNOWN = "unknown"  # a newer server's reason


class AdapterState(StrEnum):
    """Whether an adapter can be used."""

    READY = "ready"
    QUARANTINED = "quarantined"  # its bytes on disk differ from its version
    INCOMPATIBLE = "incompatible"  # stored for another base model, or a larger --max-rank
    UNKNOWN = "unknown"


class Residency(StrEnum):
    """The fastest memory that holds an adapter's weights."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"
    UNKNOWN = "unknown"


class Visibility(StrEnum):
    """Who may use an adapter."""

    PRIVATE = "private"
    SHARED = "shared"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class UsedAdapter:
    """An adapter and the immutable version that served the whole request."""

    adapter_id: str
    version: str


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the most likely tokens at a position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the raw logits at one position: the sampled token's, and the most likely tokens'."""

    logprob: float
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds the request spent in each stage, on the server's clock."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    adapter_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a stream."""

    request_id: str
    adapters: tuple[UsedAdapter, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """More text, and the tokens it came from; `logprobs` is parallel to them, or empty."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event; `stop_match` is the stop token or stop string that ended it, if one did."""

    finish_reason: FinishReason
    stop_match: int | str | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: what `stream` would have yielded, put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    adapters: tuple[UsedAdapter, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_match: int | str | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter. `version` is the identity of its content, `etag` of the name's last publish."""

    adapter_id: str
    version: str
    etag: str
    size_bytes: int
    rank: int
    target_modules: tuple[str, ...]
    state: AdapterState
    residency: Residency
    pinned: bool
    visibility: Visibility
    create_time: datetime | None  # UTC
    last_used_time: datetime | None  # UTC; None: not used yet
    owner: str
    references: int = 0  # requests that use this version now


@dataclass(frozen=True, slots=True)
class UploadResult:
    """`created` is False when the name already had this very content."""

    adapter: Adapter
    created: bool
    warnings: tuple[str, ...] = ()


class UploadState(StrEnum):
    """Whether an upload still waits for its bytes."""

    ACTIVE = "active"
    PUBLISHED = "published"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How far an upload came."""

    state: UploadState
    committed_size: int  # bytes that are safely on disk
    expire_time: datetime | None  # UTC; then it is forgotten
    adapter: Adapter | None  # once published, and while the name is there


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server was started with."""

    max_rank: int
    max_slots: int  # adapters resident at one time
    max_running: int  # requests decoded together
    max_waiting: int
    max_adapter_bytes: int
    memory_bytes: int  # KV and adapters together
    max_step_tokens: int  # in one forward pass


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What runs at the other end. `features` names what works there: "resume", "blend", ..."""

    model: str
    base_id: str
    architecture: str
    quantization: str
    device: str
    dtype: str
    context_length: int
    vocab_size: int
    limits: ServerLimits
    version: str
    features: tuple[str, ...]
