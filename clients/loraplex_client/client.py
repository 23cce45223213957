"""The synchronous client.

`Client` stands on gRPC's own synchronous stubs, not on `AsyncClient` in a background thread: a
synchronous channel is thread-safe by itself, survives being called from inside a running event
loop, and ends with Ctrl-C where it stands. What the two clients share is everything that decides
(`wire`, `upload`, `errors`); each method here and its twin in `aio` only carries messages.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from loraplex_client import wire
from loraplex_client.channel import Connected, Tls, stubs, sync_channel
from loraplex_client.errors import LoraplexError, from_rpc_error
from loraplex_client.transfer import Transfer
from loraplex_client.upload import (
    DEFAULT_RETRY,
    Deadline,
    OnRetry,
    Progress,
    RetryPolicy,
    Tries,
    prepare,
)
from loraplex_client.values import (
    Adapter,
    Completion,
    Event,
    ServerInfo,
    UploadResult,
    UploadStatus,
)
from loraplex_client.wire import ChatOptions, GenerateOptions, Message


class Client(Connected):
    """One channel to one server, for any number of threads; a context manager.

    `timeout` is in seconds, for the whole call; None waits for as long as it takes.
    """

    def __init__(
        self,
        target: str,
        token: str | None = None,
        tls: Tls = None,
        *,
        retry: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        super().__init__(target, token, retry)
        self._channel = sync_channel(target, tls)
        self._inference, self._adapters = stubs(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._closed = True
        self._channel.close()

    def stream(
        self,
        prompt: str | None = None,
        adapter_id: str = "",
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """Yields Started, Deltas as they come, Finished. Closing the generator cancels the request.

        The request is sent when the first event is asked for. `options` are those of
        `GenerateOptions`.
        """
        request = wire.generate_request(prompt, adapter_id, messages, token_ids, options)
        return self._events(request, timeout)

    def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> Generator[Event, None, None]:
        self._require_open()
        call = self._inference.Generate(
            request, timeout=timeout, metadata=wire.metadata(self._token, request.adapter_id)
        )
        num_tokens = 0
        try:
            for response in call:
                num_tokens += len(response.delta.token_ids)
                event = wire.event_of(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, num_tokens) from error
        finally:
            call.cancel()

    def complete(
        self,
        prompt: str | None = None,
        adapter_id: str = "",
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """The whole answer at once; `options` are those of `GenerateOptions`."""
        request = wire.generate_request(prompt, adapter_id, messages, token_ids, options)
        with closing(self._events(request, timeout)) as events:
            return wire.completion_of(events)

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> tuple[int, ...]:
        """Token ids, exactly as `stream` would have the prompt or the chat tokenised."""
        request = wire.tokenize_request(prompt, messages, options)
        return tuple(self._call(self._inference.Tokenize, request, timeout).token_ids)

    def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        return wire.server_info_of(self._call(self._inference.GetServerInfo, request, timeout))

    def upload_adapter(
        self,
        adapter_id: str,
        path: str | Path,
        replace: bool = False,
        progress: Progress | None = None,
        *,
        if_match_etag: str | None = None,
        on_retry: OnRetry | None = None,
        timeout: float | None = None,
    ) -> UploadResult:
        """Sends a PEFT folder; when this returns, the adapter is durable and usable.

        A name that holds other content is refused, unless `replace` says so, or `if_match_etag`
        is still the name's etag. A broken connection goes on where it broke, a bounded number of
        times, each told to `on_retry`; so does a new call with the same folder. `progress` is
        called on gRPC's sending thread, one call at a time.
        """
        self._require_open()
        deadline = Deadline.after(timeout)
        upload = prepare(adapter_id, path, replace, if_match_etag)
        tries = Tries(upload, self._retry, deadline, on_retry)
        while True:
            try:
                return Transfer(
                    self._adapters,
                    self._target,
                    self._token,
                    tries.upload,
                    progress,
                    deadline.remaining(),
                ).result()
            except LoraplexError as error:
                delay = tries.failed(error)
                if delay is None:
                    raise
            time.sleep(delay)

    def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadStatus:
        """How far an upload came; NotFound once it has expired."""
        request = adapters_pb2.GetUploadRequest(upload_id=upload_id)
        return wire.upload_status_of(self._call(self._adapters.GetUpload, request, timeout))

    def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        response = self._call(self._adapters.GetAdapter, request, timeout, adapter_id)
        return wire.adapter_of(response.adapter)

    def list_adapters(
        self, *, page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Adapter]:
        """All adapters by name, fetched in pages (0: the server's size); `timeout` is a page's."""
        request = adapters_pb2.ListAdaptersRequest(page_size=page_size)
        return self._pages(request, timeout)

    def _pages(
        self, request: adapters_pb2.ListAdaptersRequest, timeout: float | None
    ) -> Iterator[Adapter]:
        while True:
            response = self._call(self._adapters.ListAdapters, request, timeout)
            yield from map(wire.adapter_of, response.adapters)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def delete_adapter(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Takes the name away at once; requests that run on it finish."""
        request = adapters_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        self._call(self._adapters.DeleteAdapter, request, timeout, adapter_id)

    def pin_adapter(
        self, adapter_id: str, pinned: bool = True, *, timeout: float | None = None
    ) -> Adapter:
        """Keeps an adapter in device memory, or (pinned=False) no longer."""
        request = adapters_pb2.PinAdapterRequest(adapter_id=adapter_id, pinned=pinned)
        response = self._call(self._adapters.PinAdapter, request, timeout, adapter_id)
        return wire.adapter_of(response.adapter)

    def _call(
        self,
        method: Callable[..., Any],
        request: object,
        timeout: float | None,
        adapter_id: str = "",
    ) -> Any:
        self._require_open()
        try:
            return method(request, timeout=timeout, metadata=wire.metadata(self._token, adapter_id))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from error
