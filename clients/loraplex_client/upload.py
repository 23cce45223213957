"""An adapter on its way to the server: the folder, the messages, when to try again. No network.

A PEFT folder becomes one header, chunks of at most 1 MiB and one finish. The server publishes at
the finish alone, and keeps what came of a stream that broke: the next try goes on from there.
"""

import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex_protos.v1 import adapters_pb2

from loraplex_client.errors import (
    AdapterFolderError,
    LoraplexError,
    ServerUnreachable,
    Unavailable,
)
from loraplex_client.weights import Weights, find_weights

Progress = Callable[[int, int], None]
"""Called with (sent_bytes, total_bytes), from where the upload begins: 0, or what the server has.
When it starts again, it goes back to that."""

OnRetry = Callable[[LoraplexError, int, int], None]
"""Called with (error, number, of) before the wait for the next try: it is retry `number` of at most
so many in a row that get no further."""

MAX_CONFIG_BYTES = 64 << 10

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "loraplex:upload")
_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Upload:
    """One adapter folder, read and hashed: what it takes to send it, any number of times."""

    weights: Weights
    header: adapters_pb2.UploadHeader

    @property
    def total_size(self) -> int:
        return self.header.total_size

    def resumed(self, offset: int) -> "Upload":
        """The same, sent from `offset` on."""
        header = adapters_pb2.UploadHeader()
        header.CopyFrom(self.header)
        header.resume_offset = offset
        return replace(self, header=header)

    def requests(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """Every message of one try; tries may overlap."""
        yield adapters_pb2.UploadAdapterRequest(header=self.header)
        offset = self.header.resume_offset
        for data in self.weights.read(offset):
            yield _chunk(offset, data)
            offset += len(data)
        yield adapters_pb2.UploadAdapterRequest(finish=adapters_pb2.UploadFinish())


def _chunk(offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
    return adapters_pb2.UploadAdapterRequest(
        chunk=adapters_pb2.UploadChunk(offset=offset, data=data, crc32=zlib.crc32(data))
    )


def sent_bytes(request: adapters_pb2.UploadAdapterRequest) -> int | None:
    """How much of the file is sent once `request` is; None for the finish, which adds nothing."""
    if request.HasField("finish"):
        return None
    if request.HasField("header"):
        return request.header.resume_offset
    return request.chunk.offset + len(request.chunk.data)


def prepare(
    adapter_id: str, path: str | Path, replace: bool, if_match_etag: str | None = None
) -> Upload:
    """Reads and hashes a PEFT folder; AdapterFolderError says what is wrong with it."""
    folder = Path(path)
    weights = find_weights(folder)
    config = _config(folder)
    sha256 = weights.sha256()
    header = adapters_pb2.UploadHeader(
        adapter_id=adapter_id,
        upload_id=upload_id_of(adapter_id, sha256, config),
        total_size=weights.size,
        sha256=sha256,
        adapter_config_json=config,
        replace=replace,
        if_match_etag=if_match_etag or "",
    )
    return Upload(weights, header)


def upload_id_of(adapter_id: str, weights_sha256: str, config_json: str) -> str:
    """Follows from name and content: the same upload, run anew, is the same to the server."""
    of_name = uuid.uuid5(_NAMESPACE, adapter_id)
    return str(uuid.uuid5(of_name, f"{weights_sha256} {config_json}"))


def _config(folder: Path) -> str:
    path = folder / _CONFIG
    if not path.is_file():
        raise AdapterFolderError(f"{folder} holds no {_CONFIG}; expected a folder saved by PEFT")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterFolderError(f"{path} is larger than {MAX_CONFIG_BYTES >> 10} KiB")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise AdapterFolderError(f"{path} is not UTF-8 text") from None


@dataclass(frozen=True, slots=True)
class Deadline:
    """A timeout that several tries share; `at` is on the monotonic clock, None is never."""

    at: float | None

    @classmethod
    def after(cls, timeout: float | None) -> "Deadline":
        return cls(None if timeout is None else time.monotonic() + timeout)

    def remaining(self) -> float | None:
        """Seconds left, None without a limit; 0 when it has passed."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a broken upload goes on, and after how long: `delays` in seconds.

    The default outlasts the restart of a server. What brought the upload further starts the count
    anew.
    """

    delays: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    longest: float = 30.0

    def delay(self, failures: int, error: LoraplexError, remaining: float | None) -> float | None:
        """Seconds to wait after the `failures`-th failed try in a row; None: there is no other."""
        if failures > len(self.delays):
            return None
        delay = max(self.delays[failures - 1], error.retry_after or 0.0)
        limit = self.longest if remaining is None else min(self.longest, remaining)
        return None if delay > limit else delay


DEFAULT_RETRY = RetryPolicy()
_MAX_CORRECTIONS = 4  # wrong offsets in a row that bring nothing new


class Tries:
    """The tries of one upload.

    Mutable: `upload`, as the next try sends it; `_failures` and `_corrections` since it got
    further; `_furthest`, the most that the server ever had; `_reached`, whether there is a server.
    """

    def __init__(
        self,
        upload: Upload,
        policy: RetryPolicy,
        deadline: Deadline,
        on_retry: OnRetry | None = None,
    ) -> None:
        self.upload = upload
        self._policy = policy
        self._deadline = deadline
        self._on_retry = on_retry
        self._failures = 0
        self._corrections = 0
        self._furthest = 0
        self._reached = False

    def failed(self, error: LoraplexError) -> float | None:
        """Seconds until the next try; None: the error is final."""
        committed = _committed_size(error)
        if committed is not None and committed <= self.upload.total_size:
            return self._go_on_from(committed)
        if not _may_pass(error, self._reached):
            return None
        self._reached = self._reached or not isinstance(error, ServerUnreachable)
        self._failures += 1
        delay = self._policy.delay(self._failures, error, self._deadline.remaining())
        if delay is not None and self._on_retry is not None:
            self._on_retry(error, self._failures, len(self._policy.delays))
        return delay

    def _go_on_from(self, committed: int) -> float | None:
        """At once: the server only said where it stands. Offsets that go nowhere are given up."""
        if committed > self._furthest:
            self._furthest = committed
            self._failures = self._corrections = 0
        self._corrections += 1
        if self._corrections > _MAX_CORRECTIONS:
            return None
        self._reached = True
        self.upload = self.upload.resumed(committed)
        return 0.0


def _committed_size(error: LoraplexError) -> int | None:
    """What the server has, where it refused an offset because of that."""
    size = error.metadata.get("committed_size", "")
    return int(size) if error.reason == "OFFSET_MISMATCH" and size.isdecimal() else None


_PASSING = frozenset({"UPLOAD_STALLED", "CRC32_MISMATCH"})


def _may_pass(error: LoraplexError, reached: bool) -> bool:
    """A server never reached is an error; one that went away may return. A store that cannot be
    written will not be a moment later."""
    if isinstance(error, ServerUnreachable):
        return reached
    if isinstance(error, Unavailable):
        return error.reason != "STORE_UNAVAILABLE"
    return error.reason in _PASSING
