"""One try at one upload, under way on gRPC's own threads; both clients send through this.

The asynchronous one too: when grpc.aio's write() loses the race against the end of its call, which
an early answer makes likely, it puts INTERNAL in the place of the status the server sent
(grpc/grpc#36066). The synchronous API stops asking for messages instead, and keeps the status.
"""

from collections.abc import Iterator
from typing import Any

import grpc
from loraplex_protos.v1 import adapters_pb2

from loraplex_client import wire
from loraplex_client.errors import Cancelled, from_rpc_error
from loraplex_client.upload import Progress, Upload, sent_bytes
from loraplex_client.values import UploadResult


class Transfer:
    """Sends one upload. `_broken` fills from gRPC's sending thread: what failed on our side."""

    def __init__(
        self,
        stub: Any,
        target: str,
        token: str | None,
        upload: Upload,
        progress: Progress | None,
        timeout: float | None,
    ) -> None:
        self._target = target
        self._broken: list[Exception] = []
        self.call = stub.UploadAdapter.future(
            self._feed(upload, progress),
            timeout=timeout,
            metadata=wire.metadata(token, upload.header.adapter_id),
        )

    def _feed(
        self, upload: Upload, progress: Progress | None
    ) -> Iterator[adapters_pb2.UploadAdapterRequest]:
        """An error is kept for the caller (gRPC would only log it) and ends the stream without a
        finish: nothing is published."""
        try:
            for request in upload.requests():
                yield request
                sent = sent_bytes(request)
                if progress is not None and sent is not None:
                    progress(sent, upload.total_size)
        except Exception as error:
            self._broken.append(error)

    def fail(self, error: Exception) -> None:
        """Ends the upload; `result` raises `error`."""
        self._broken.append(error)
        self.call.cancel()

    def result(self) -> UploadResult:
        """Waits for the server's answer. Ends the upload when the wait itself is interrupted."""
        try:
            response = self.call.result()
        except grpc.FutureCancelledError as error:
            if not self._broken:
                raise Cancelled("the upload was cancelled") from error
        except grpc.RpcError as error:
            if not self._broken:
                raise from_rpc_error(error, self._target) from error
        finally:
            self.call.cancel()
        if self._broken:
            raise self._broken[0]
        return wire.upload_result_of(response)
