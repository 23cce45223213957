"""The messages of one upload, in the one order that is allowed: header, chunks, finish."""

import asyncio
import re
from collections.abc import AsyncIterator

from loraplex_protos.v1 import adapters_pb2 as pb

from loraplex.adapters.store import UploadRequest, validate_adapter_id
from loraplex.api.validation import check_upload_id
from loraplex.errors import InvalidRequestError, RequestError, not_implemented

MAX_CHUNK_BYTES = 1 << 20
END_SECONDS = 1.0
"""How long a client may hold its stream open behind the finish before it is taken as ended."""

_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")


def upload_request(header: pb.UploadHeader) -> UploadRequest:
    """The header, judged as far as that goes without the store; that knows sizes and names."""
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
    return UploadRequest(
        adapter_id=header.adapter_id,
        upload_id=header.upload_id.lower(),
        total_size=header.total_size,
        sha256=header.sha256.lower(),
        config_json=header.adapter_config_json,
        resume_offset=header.resume_offset,
        replace=header.replace,
        if_match_etag=header.if_match_etag,
    )


class UploadMessages:
    """Reads a call's messages; raises UPLOAD_* where they stall, stop or come out of order.

    Mutable: `_interruption`, the error that ends the waiting; `_wait`, while it waits.
    """

    def __init__(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], stall_seconds: float
    ) -> None:
        self._requests = requests
        self._stall_seconds = stall_seconds
        self._interruption: RequestError | None = None
        self._wait: asyncio.Timeout | None = None

    def interrupt(self, error: RequestError) -> None:
        """No message is waited for any more: whoever does, or will, gets `error`."""
        self._interruption = error
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(asyncio.get_running_loop().time())

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
        if self._interruption is not None:
            raise self._interruption
        try:
            async with asyncio.timeout(seconds) as self._wait:
                return await anext(self._requests, None)
        except TimeoutError:
            stalled = RequestError("UPLOAD_STALLED", f"no message for {seconds:g} seconds")
            raise self._interruption or stalled from None
        finally:
            self._wait = None


def _check_chunk(chunk: pb.UploadChunk) -> None:
    if not 1 <= len(chunk.data) <= MAX_CHUNK_BYTES:
        raise InvalidRequestError("chunk.data", f"must be 1 to {MAX_CHUNK_BYTES} bytes")


def _out_of_order(message: str) -> RequestError:
    return RequestError("UPLOAD_OUT_OF_ORDER", message)
