"""An upload's way in: one stream at a time, kept for resume when that breaks, then published."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from loraplex_protos.v1 import adapters_pb2 as pb

from loraplex.adapters.peft import AdapterConfig, version_of
from loraplex.adapters.store import AdapterRecord, Upload, UploadRequest
from loraplex.api.calls import Call
from loraplex.api.pins import Pins
from loraplex.api.protocols import PublisherLike, StoreLike
from loraplex.api.threads import Background
from loraplex.api.uploads import UploadMessages, upload_request
from loraplex.errors import RequestError

# Sending the rest, or the same again, would not help; or the room is needed.
_SPOILED = frozenset(
    {
        "ADAPTER_INVALID",
        "DISK_FULL",
        "INVALID_FIELD",
        "SHA256_MISMATCH",
        "UPLOAD_OUT_OF_ORDER",
    }
)

Published = tuple[AdapterRecord, bool, Seq[str]]
"""The name's record, whether it is new, warnings."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """Who receives an upload at the moment."""

    request: UploadRequest
    messages: UploadMessages
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Receiver:
    """Takes adapters in. Mutable: `_streams`, those under way by upload_id."""

    def __init__(
        self,
        store: StoreLike,
        publisher: PublisherLike,
        pins: Pins,
        background: Background,
        base_id: str,
        stall_seconds: float,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._pins = pins
        self._background = background
        self._base_id = base_id
        self._stall_seconds = stall_seconds
        self._streams: dict[str, _Stream] = {}

    async def receive(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], call: Call
    ) -> Published:
        messages = UploadMessages(requests, self._stall_seconds)
        request = upload_request(await messages.header())
        call.note(
            adapter_id=request.adapter_id, upload_id=request.upload_id, bytes=request.total_size
        )
        if request.resume_offset:
            call.note(resumed_at=request.resume_offset)
        config = await self._background.run(self._publisher.check_config, request.config_json)
        async with self._alone(_Stream(request, messages)):
            record = await self._background.run(self._present, request, config)
            if record is not None:
                await self._background.run(self._store.clear_upload, request)
                return record, False, ()
            async with self._begun(request) as upload:
                async for chunk in messages.chunks():
                    await self._background.run(_write, upload, chunk)
                await messages.end()
                return await self._publish(upload, config)

    @asynccontextmanager
    async def _alone(self, stream: _Stream) -> AsyncIterator[None]:
        """No other stream has the upload: one that did is told to end, and has ended."""
        upload_id = stream.request.upload_id
        while (other := self._streams.get(upload_id)) is not None:
            if not _is_same(other.request, stream.request):
                break  # the store says what differs, and the other goes on
            other.messages.interrupt(
                RequestError("UPLOAD_TAKEN_OVER", "another stream goes on with this upload")
            )
            await other.ended.wait()
        else:
            self._streams[upload_id] = stream
        try:
            yield
        finally:
            if self._streams.get(upload_id) is stream:
                del self._streams[upload_id]
            stream.ended.set()

    def _present(self, request: UploadRequest, config: AdapterConfig) -> AdapterRecord | None:
        """The name's record, if it is this very content, and sound: then no byte need come."""
        try:
            record = self._store.get(request.adapter_id)
        except RequestError:  # there is no such name
            return None
        is_same = record.version == version_of(request.sha256, config, self._base_id)
        return record if is_same and self._store.is_sound(record.version) else None

    @asynccontextmanager
    async def _begun(self, request: UploadRequest) -> AsyncIterator[Upload]:
        """The upload. However the stream ends, what came is kept, unless it is of no use."""
        begun: list[Upload] = []  # filled in the thread, which outlives a cancel of this call
        spoiled = False
        try:
            await self._background.run(lambda: begun.append(self._store.begin(request)))
            yield begun[0]
        except RequestError as error:
            spoiled = error.reason.name in _SPOILED
            raise
        finally:
            for upload in begun:
                await self._background.run(upload.discard if spoiled else upload.suspend)

    async def _publish(self, upload: Upload, config: AdapterConfig) -> Published:
        warning = None
        try:
            record, created, warnings = await self._background.run(self._finish, upload, config)
        finally:
            warning = await self._pins.follow(upload.request.adapter_id)
        return record, created, [*warnings, *([warning] if warning else [])]

    def _finish(self, upload: Upload, config: AdapterConfig) -> Published:
        sha256 = upload.finish()
        if sha256 != upload.request.sha256:
            raise RequestError(
                "SHA256_MISMATCH",
                "the bytes that came are not those of the header's sha256",
                field="header.sha256",
                metadata={"sha256": sha256},
            )
        return self._publisher.publish(upload, config, sha256)


def _is_same(one: UploadRequest, other: UploadRequest) -> bool:
    """The same content for the same name, whatever else they ask."""
    return one == replace(
        other,
        resume_offset=one.resume_offset,
        replace=one.replace,
        if_match_etag=one.if_match_etag,
    )


def _write(upload: Upload, chunk: pb.UploadChunk) -> None:
    if chunk.HasField("crc32") and zlib.crc32(chunk.data) != chunk.crc32:
        raise RequestError(
            "CRC32_MISMATCH",
            f"the chunk at offset {chunk.offset} is not what its crc32 says",
            field="chunk.crc32",
        )
    upload.write(chunk.offset, chunk.data)
