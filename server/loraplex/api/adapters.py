"""AdapterService: adapters come over the wire, are listed, shown, pinned and taken away."""

from collections.abc import AsyncIterator

from google.protobuf.timestamp_pb2 import Timestamp
from loraplex_protos.v1 import adapters_pb2 as pb

from loraplex.adapters.store import (
    AdapterRecord,
    AdapterState,
    Visibility,
    state_under,
    validate_adapter_id,
)
from loraplex.adapters.tiers import Tier
from loraplex.api.calls import Call
from loraplex.api.pins import Pins
from loraplex.api.protocols import EngineLike, StoreLike
from loraplex.api.receiving import Receiver
from loraplex.api.threads import Background
from loraplex.api.validation import check_upload_id

_STATES = {
    AdapterState.READY: pb.ADAPTER_STATE_READY,
    AdapterState.QUARANTINED: pb.ADAPTER_STATE_QUARANTINED,
    AdapterState.INCOMPATIBLE: pb.ADAPTER_STATE_INCOMPATIBLE,
}
_VISIBILITIES = {
    Visibility.PRIVATE: pb.ADAPTER_VISIBILITY_PRIVATE,
    Visibility.SHARED: pb.ADAPTER_VISIBILITY_SHARED,
}
_RESIDENCIES = {
    Tier.DISK: pb.ADAPTER_RESIDENCY_DISK,
    Tier.HOST: pb.ADAPTER_RESIDENCY_HOST,
    Tier.DEVICE: pb.ADAPTER_RESIDENCY_DEVICE,
}


class AdapterServicer:
    """The service's methods, behind the boundary that parses and answers errors."""

    def __init__(
        self,
        engine: EngineLike,
        store: StoreLike,
        receiver: Receiver,
        pins: Pins,
        background: Background,
        max_rank: int,
    ) -> None:
        self._engine = engine
        self._store = store
        self._receiver = receiver
        self._pins = pins
        self._background = background
        self._max_rank = max_rank

    async def UploadAdapter(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], call: Call
    ) -> pb.UploadAdapterResponse:
        record, created, warnings = await self._receiver.receive(requests, call)
        call.note(version=record.version, created=created)
        return pb.UploadAdapterResponse(
            adapter=self._adapter(record), created=created, warnings=warnings
        )

    async def GetUpload(self, request: pb.GetUploadRequest, call: Call) -> pb.GetUploadResponse:
        check_upload_id(request.upload_id, "upload_id")
        status = self._store.upload_status(request.upload_id.lower())
        record = status.record
        return pb.GetUploadResponse(
            state=pb.UPLOAD_STATE_ACTIVE if record is None else pb.UPLOAD_STATE_PUBLISHED,
            committed_size=status.committed_size,
            expire_time=_timestamp(status.expire_time),
            adapter=None if record is None else self._adapter(record),
        )

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
        try:
            await self._background.run(self._store.delete, request.adapter_id)
        finally:
            await self._pins.follow(request.adapter_id)
        return pb.DeleteAdapterResponse()

    async def PinAdapter(self, request: pb.PinAdapterRequest, call: Call) -> pb.PinAdapterResponse:
        validate_adapter_id(request.adapter_id)
        call.note(adapter_id=request.adapter_id, pinned=request.pinned)
        change = self._pins.pin if request.pinned else self._pins.unpin
        return pb.PinAdapterResponse(adapter=self._adapter(await change(request.adapter_id)))

    def _adapter(self, record: AdapterRecord) -> pb.Adapter:
        used = record.last_used_time
        return pb.Adapter(
            adapter_id=record.adapter_id,
            version=record.version,
            etag=record.etag,
            kind=pb.ADAPTER_KIND_LORA,
            size_bytes=record.size_bytes,
            rank=record.rank,
            target_modules=record.target_modules,
            state=_STATES[state_under(record, self._max_rank)],
            residency=_RESIDENCIES[self._engine.residency(record.version)],
            pinned=record.pinned,
            visibility=_VISIBILITIES[record.visibility],
            create_time=_timestamp(record.create_time),
            last_used_time=None if used is None else _timestamp(used),
            owner=record.owner,
            references=self._store.references(record.version),
        )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromMicroseconds(round(seconds * 1e6))
    return timestamp
