"""An adapter on its way to the server: the folder, the messages, when to try again. No network.

A PEFT folder becomes one header, chunks of at most 1 MiB and one finish. The server publishes at
the finish alone, so a stream that broke left nothing behind and starts again at 0.
"""

import hashlib
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loraplex_protos.v1 import adapters_pb2

from loraplex_client.errors import (
    Aborted,
    AdapterFolderError,
    LoraplexError,
    ServerUnreachable,
    Unavailable,
)

Progress = Callable[[int, int], None]
"""Called with (sent_bytes, total_bytes), from 0; goes back to 0 when the upload starts again."""

CHUNK_BYTES = 1 << 20
MAX_CONFIG_BYTES = 64 << 10

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "loraplex:upload")
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Upload:
    """One adapter folder, read and hashed: what it takes to send it, any number of times."""

    weights: Path
    header: adapters_pb2.UploadHeader

    @property
    def total_size(self) -> int:
        return self.header.total_size

    def requests(self) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """Every message of one try. Reads the file by its own handle, so that tries may overlap."""
        yield adapters_pb2.UploadAdapterRequest(header=self.header)
        offset = 0
        with self.weights.open("rb") as file:
            while offset < self.total_size:
                data = file.read(min(CHUNK_BYTES, self.total_size - offset))
                if not data:
                    raise AdapterFolderError(f"{self.weights} shrank while it was sent")
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
    return request.chunk.offset + len(request.chunk.data)


def prepare(adapter_id: str, path: str | Path, replace: bool) -> Upload:
    """Reads and hashes a PEFT folder; AdapterFolderError says what is wrong with it.

    The upload's id follows from the name and the content, so that the same upload, started anew,
    is the same to the server.
    """
    folder = Path(path)
    weights = _weights(folder)
    config = _config(folder)
    size, digest = _hash(weights)
    content = digest.copy()
    content.update(config.encode())
    upload_id = uuid.uuid5(uuid.uuid5(_NAMESPACE, adapter_id), content.hexdigest())
    header = adapters_pb2.UploadHeader(
        adapter_id=adapter_id,
        upload_id=str(upload_id),
        total_size=size,
        sha256=digest.hexdigest(),
        adapter_config_json=config,
        replace=replace,
    )
    return Upload(weights, header)


def _weights(folder: Path) -> Path:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise AdapterFolderError(f"{folder} {what}; expected a folder saved by PEFT")
    weights = folder / _WEIGHTS
    if weights.is_file():
        return weights
    if (folder / "adapter_model.bin").exists():
        raise AdapterFolderError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read; "
            "save the adapter as safetensors (PEFT's default) and upload that"
        )
    if (folder / f"{_WEIGHTS}.index.json").exists():
        raise AdapterFolderError(
            f"{folder} holds an adapter in several safetensors files; save it as one, {_WEIGHTS}"
        )
    raise AdapterFolderError(f"{folder} holds no {_WEIGHTS}; expected a folder saved by PEFT")


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


def _hash(weights: Path) -> "tuple[int, hashlib._Hash]":
    digest, size = hashlib.sha256(), 0
    with weights.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            if size == 0 and data.startswith(_LFS_POINTER):
                raise AdapterFolderError(
                    f"{weights} is a git-lfs pointer, not the weights: run git lfs pull"
                )
            digest.update(data)
            size += len(data)
    return size, digest


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
    """How often a broken upload starts again, and after how long: `delays` in seconds."""

    delays: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    longest: float = 30.0

    def delay(self, failures: int, error: LoraplexError, remaining: float | None) -> float | None:
        """Seconds to wait after the `failures`-th failed try; None: the error is final."""
        if failures > len(self.delays) or not _may_pass(error, failures == 1):
            return None
        delay = max(self.delays[failures - 1], error.retry_after or 0.0)
        limit = self.longest if remaining is None else min(self.longest, remaining)
        return None if delay > limit else delay


DEFAULT_RETRY = RetryPolicy()


def _may_pass(error: LoraplexError, first: bool) -> bool:
    """A server never reached is an error; one that went away may return, and may take a moment
    to notice that the stream before this one is gone."""
    if isinstance(error, ServerUnreachable):
        return not first
    if isinstance(error, Aborted):
        return not first and error.reason == "UPLOAD_IN_PROGRESS"
    return isinstance(error, Unavailable)
