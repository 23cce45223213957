"""AdapterService: adapters come over the wire, are listed, shown and taken away."""

import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack

from google.protobuf.timestamp_pb2 import Timestamp
from loraplex_protos.v1 import adapters_pb2 as pb

from loraplex.adapters.peft import AdapterConfig, version_of
from loraplex.adapters.store import (
    AdapterRecord,
    AdapterState,
    Upload,
    Visibility,
    validate_adapter_id,
)
from loraplex.api.calls import Call
from loraplex.api.protocols import EngineLike, PublisherLike, StoreLike
from loraplex.api.threads import in_thread
from loraplex.api.uploads import UploadMessages, check_header
from loraplex.errors import RequestError, not_implemented

_STATES = {
    AdapterState.READY: pb.ADAPTER_STATE_READY,
    AdapterState.QUARANTINED: pb.ADAPTER_STATE_QUARANTINED,
    AdapterState.INCOMPATIBLE: pb.ADAPTER_STATE_INCOMPATIBLE,
}
_VISIBILITIES = {
    Visibility.PRIVATE: pb.ADAPTER_VISIBILITY_PRIVATE,
    Visibility.SHARED: pb.ADAPTER_VISIBILITY_SHARED,
}


class AdapterServicer:
    """The service's methods, behind the boundary that parses and answers errors."""

    def __init__(
        self,
        engine: EngineLike,
        store: StoreLike,
        publisher: PublisherLike,
        base_id: str,
        *,
        stall_seconds: float,
    ) -> None:
        self._engine = engine
        self._store = store
        self._publisher = publisher
        self._base_id = base_id
        self._stall_seconds = stall_seconds

    async def UploadAdapter(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], call: Call
    ) -> pb.UploadAdapterResponse:
        messages = UploadMessages(requests, self._stall_seconds)
        header = await messages.header()
        check_header(header)
        call.note(adapter_id=header.adapter_id, upload_id=header.upload_id, bytes=header.total_size)
        config = await in_thread(self._publisher.check_config, header.adapter_config_json)
        present = self._present(header, config)
        if present is not None:
            return pb.UploadAdapterResponse(adapter=self._adapter(present), created=False)
        cleanup = ExitStack()
        try:
            upload = await in_thread(self._begin, header, cleanup)
            async for chunk in messages.chunks():
                await in_thread(_write, upload, chunk)
            await messages.end()
            record, created, warnings = await in_thread(self._publish, upload, header, config)
        finally:
            await in_thread(cleanup.close)
        call.note(version=record.version, created=created)
        return pb.UploadAdapterResponse(
            adapter=self._adapter(record), created=created, warnings=warnings
        )

    async def GetUpload(self, request: pb.GetUploadRequest, call: Call) -> pb.GetUploadResponse:
        raise not_implemented("GetUpload")

    async def GetAdapter(self, request: pb.GetAdapterRequest, call: Call) -> pb.GetAdapterResponse:
        validate_adapter_id(request.adapter_id)
        return pb.GetAdapterResponse(adapter=self._adapter(self._store.get(request.adapter_id)))

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, call: Call
    ) -> pb.ListAdaptersResponse:
        records, next_token = self._store.list(request.page_size, request.page_token)
        return pb.ListAdaptersResponse(
            adapters=[self._adapter(record) for record in records], next_page_token=next_token
        )

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, call: Call
    ) -> pb.DeleteAdapterResponse:
        validate_adapter_id(request.adapter_id)
        call.note(adapter_id=request.adapter_id)
        await in_thread(self._store.delete, request.adapter_id)
        return pb.DeleteAdapterResponse()

    async def PinAdapter(self, request: pb.PinAdapterRequest, call: Call) -> pb.PinAdapterResponse:
        raise not_implemented("PinAdapter")

    def _present(self, header: pb.UploadHeader, config: AdapterConfig) -> AdapterRecord | None:
        """The name's record, if it is this very content: then no byte need come."""
        try:
            record = self._store.get(header.adapter_id)
        except RequestError:
            return None
        if record.version != version_of(header.sha256.lower(), config, self._base_id):
            raise RequestError(
                "ADAPTER_EXISTS",
                f"{header.adapter_id} holds other content; delete it or use another name",
                field="header.adapter_id",
            )
        return record if record.state is AdapterState.READY else None

    def _begin(self, header: pb.UploadHeader, cleanup: ExitStack) -> Upload:
        upload = self._store.begin(header.adapter_id, header.total_size)
        cleanup.callback(upload.discard)
        return upload

    def _publish(
        self, upload: Upload, header: pb.UploadHeader, config: AdapterConfig
    ) -> tuple[AdapterRecord, bool, Sequence[str]]:
        sha256 = upload.finish()
        if sha256 != header.sha256.lower():
            raise RequestError(
                "SHA256_MISMATCH",
                "the bytes that came are not those of the header's sha256",
                field="header.sha256",
                metadata={"sha256": sha256},
            )
        return self._publisher.publish(
            upload, header.adapter_id, config, sha256, Visibility.PRIVATE
        )

    def _adapter(self, record: AdapterRecord) -> pb.Adapter:
        on_device = self._engine.residency(record.version)
        used = record.last_used_time
        return pb.Adapter(
            adapter_id=record.adapter_id,
            version=record.version,
            etag=record.etag,
            kind=pb.ADAPTER_KIND_LORA,
            size_bytes=record.size_bytes,
            rank=record.rank,
            target_modules=record.target_modules,
            state=_STATES[record.state],
            residency=pb.ADAPTER_RESIDENCY_DEVICE if on_device else pb.ADAPTER_RESIDENCY_DISK,
            visibility=_VISIBILITIES[record.visibility],
            create_time=_timestamp(record.create_time),
            last_used_time=None if used is None else _timestamp(used),
            owner=record.owner,
        )


def _write(upload: Upload, chunk: pb.UploadChunk) -> None:
    if chunk.HasField("crc32") and zlib.crc32(chunk.data) != chunk.crc32:
        raise RequestError(
            "CRC32_MISMATCH",
            f"the chunk at offset {chunk.offset} is not what its crc32 says",
            field="chunk.crc32",
        )
    upload.write(chunk.offset, chunk.data)


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp
