"""The messages of one upload, in the one order that is allowed: header, chunks, finish."""

import asyncio
import re
from collections.abc import AsyncIterator

from loraplex_protos.v1 import adapters_pb2 as pb

from loraplex.adapters.store import validate_adapter_id
from loraplex.api.validation import check_upload_id
from loraplex.errors import InvalidRequestError, RequestError, not_implemented

MAX_CHUNK_BYTES = 1 << 20
END_SECONDS = 1.0
"""How long a client may hold its stream open behind the finish before it is taken as ended."""

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def check_header(header: pb.UploadHeader) -> None:
    """What can be judged without the store; that knows sizes and names."""
    for field in ("resume_offset", "replace", "if_match_etag"):
        if getattr(header, field):
            raise not_implemented(f"header.{field}")
    if header.visibility == pb.ADAPTER_VISIBILITY_SHARED:
        raise not_implemented("header.visibility = SHARED")
    if header.visibility not in pb.AdapterVisibility.values():
        raise InvalidRequestError("header.visibility", "is no visibility")
    validate_adapter_id(header.adapter_id, "header.adapter_id")
    check_upload_id(header.upload_id, "header.upload_id")
    if _SHA256.fullmatch(header.sha256) is None:
        raise InvalidRequestError("header.sha256", "must be 64 hexadecimal digits")
    if not header.adapter_config_json:
        raise InvalidRequestError("header.adapter_config_json", "must not be empty")


class UploadMessages:
    """Reads a call's messages; raises UPLOAD_* where they stall, stop or come out of order."""

    def __init__(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], stall_seconds: float
    ) -> None:
        self._requests = requests
        self._stall_seconds = stall_seconds

    async def header(self) -> pb.UploadHeader:
        message = await self._next(self._stall_seconds)
        if message is None:
            raise _out_of_order("the stream is empty")
        if message.WhichOneof("message") != "header":
            raise _out_of_order("the first message must be the header")
        return message.header

    async def chunks(self) -> AsyncIterator[pb.UploadChunk]:
        """Until the finish; a stream that ends before it publishes nothing."""
        while (message := await self._next(self._stall_seconds)) is not None:
            match message.WhichOneof("message"):
                case "finish":
                    return
                case "chunk":
                    _check_chunk(message.chunk)
                    yield message.chunk
                case _:
                    raise _out_of_order("after the header only chunks and a finish may come")
        raise RequestError("UPLOAD_INCOMPLETE", "the stream ended before the finish")

    async def end(self) -> None:
        """Nothing may follow the finish."""
        try:
            message = await self._next(END_SECONDS)
        except RequestError as error:
            if error.reason.name != "UPLOAD_STALLED":
                raise
            return
        if message is not None:
            raise _out_of_order("nothing may follow the finish")

    async def _next(self, seconds: float) -> pb.UploadAdapterRequest | None:
        """The next message, or None at the stream's end."""
        try:
            return await asyncio.wait_for(anext(self._requests, None), seconds)
        except TimeoutError:
            raise RequestError("UPLOAD_STALLED", f"no message for {seconds:g} seconds") from None


def _check_chunk(chunk: pb.UploadChunk) -> None:
    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
        raise InvalidRequestError("chunk.data", f"must be 1 to {MAX_CHUNK_BYTES} bytes")


def _out_of_order(message: str) -> RequestError:
    return RequestError("UPLOAD_OUT_OF_ORDER", message)
