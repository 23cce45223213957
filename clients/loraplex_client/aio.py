"""The asynchronous client: `Client`, method for method, on grpc.aio."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from loraplex_client import wire
from loraplex_client.channel import Connected, Tls, async_channel, stubs, sync_channel
from loraplex_client.errors import LoraplexError, from_rpc_error
from loraplex_client.transfer import Transfer
from loraplex_client.upload import (
    DEFAULT_RETRY,
    Deadline,
    OnRetry,
    Progress,
    RetryPolicy,
    Tries,
    Upload,
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


class AsyncClient(Connected):
    """One channel to one server, and one for uploads, for any number of tasks.

    An async context manager; make it inside the running event loop that uses it. `timeout` is in
    seconds, for the whole call; None waits for as long as it takes.
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
        self._channel = async_channel(target, tls)
        self._upload_channel = sync_channel(target, tls)
        self._inference, self._adapters = stubs(self._channel)
        _, self._uploads = stubs(self._upload_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections and every call on them."""
        self._closed = True
        self._upload_channel.close()
        await self._channel.close(None)

    def stream(
        self,
        prompt: str | None = None,
        adapter_id: str = "",
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Event, None]:
        """Yields Started, Deltas as they come, Finished. Closing the generator cancels the request.

        The request is sent when the first event is asked for. Leaving an `async for` early does
        not close it at once: `contextlib.aclosing` does. `options` are those of `GenerateOptions`.
        """
        request = wire.generate_request(prompt, adapter_id, messages, token_ids, options)
        return self._events(request, timeout)

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[Event, None]:
        self._require_open()
        call = self._inference.Generate(
            request, timeout=timeout, metadata=wire.metadata(self._token, request.adapter_id)
        )
        num_tokens = 0
        try:
            async for response in call:
                num_tokens += len(response.delta.token_ids)
                event = wire.event_of(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, num_tokens) from error
        finally:
            call.cancel()

    async def complete(
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
        async with aclosing(self._events(request, timeout)) as events:
            return wire.completion_of([event async for event in events])

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> tuple[int, ...]:
        """Token ids, exactly as `stream` would have the prompt or the chat tokenised."""
        request = wire.tokenize_request(prompt, messages, options)
        response = await self._call(self._inference.Tokenize, request, timeout)
        return tuple(response.token_ids)

    async def server_info(self, *, timeout: float | None = None) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        response = await self._call(self._inference.GetServerInfo, request, timeout)
        return wire.server_info_of(response)

    async def upload_adapter(
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
        called on the event loop, and never waited for.
        """
        self._require_open()
        deadline = Deadline.after(timeout)
        upload = await asyncio.to_thread(prepare, adapter_id, path, replace, if_match_etag)
        tries = Tries(upload, self._retry, deadline, on_retry)
        while True:
            try:
                return await self._send(tries.upload, progress, deadline.remaining())
            except LoraplexError as error:
                delay = tries.failed(error)
                if delay is None:
                    raise
            await asyncio.sleep(delay)

    async def get_upload(self, upload_id: str, *, timeout: float | None = None) -> UploadStatus:
        """How far an upload came; NotFound once it has expired."""
        request = adapters_pb2.GetUploadRequest(upload_id=upload_id)
        response = await self._call(self._adapters.GetUpload, request, timeout)
        return wire.upload_status_of(response)

    async def _send(
        self, upload: Upload, progress: Progress | None, timeout: float | None
    ) -> UploadResult:
        """One try, on gRPC's threads: `transfer` says why."""
        loop, finished = asyncio.get_running_loop(), asyncio.Event()

        def report(sent: int, total: int) -> None:
            loop.call_soon_threadsafe(call_progress, sent, total)

        def call_progress(sent: int, total: int) -> None:
            try:
                if progress is not None and not finished.is_set():
                    progress(sent, total)
            except Exception as error:
                transfer.fail(error)

        def finish(_: object) -> None:
            with suppress(RuntimeError):  # a cancelled upload may end after its event loop
                loop.call_soon_threadsafe(finished.set)

        transfer = Transfer(self._uploads, self._target, self._token, upload, report, timeout)
        transfer.call.add_done_callback(finish)
        try:
            await finished.wait()
            return transfer.result()
        finally:
            transfer.call.cancel()

    async def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        response = await self._call(self._adapters.GetAdapter, request, timeout, adapter_id)
        return wire.adapter_of(response.adapter)

    def list_adapters(
        self, *, page_size: int = 0, timeout: float | None = None
    ) -> AsyncIterator[Adapter]:
        """All adapters by name, fetched in pages (0: the server's size); `timeout` is a page's."""
        request = adapters_pb2.ListAdaptersRequest(page_size=page_size)
        return self._pages(request, timeout)

    async def _pages(
        self, request: adapters_pb2.ListAdaptersRequest, timeout: float | None
    ) -> AsyncIterator[Adapter]:
        while True:
            response = await self._call(self._adapters.ListAdapters, request, timeout)
            for adapter in response.adapters:
                yield wire.adapter_of(adapter)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    async def delete_adapter(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """Takes the name away at once; requests that run on it finish."""
        request = adapters_pb2.DeleteAdapterRequest(adapter_id=adapter_id)
        await self._call(self._adapters.DeleteAdapter, request, timeout, adapter_id)

    async def pin_adapter(
        self, adapter_id: str, pinned: bool = True, *, timeout: float | None = None
    ) -> Adapter:
        """Keeps an adapter in device memory, or (pinned=False) no longer."""
        request = adapters_pb2.PinAdapterRequest(adapter_id=adapter_id, pinned=pinned)
        response = await self._call(self._adapters.PinAdapter, request, timeout, adapter_id)
        return wire.adapter_of(response.adapter)

    async def _call(
        self,
        method: Callable[..., Any],
        request: object,
        timeout: float | None,
        adapter_id: str = "",
    ) -> Any:
        self._require_open()
        try:
            return await method(
                request, timeout=timeout, metadata=wire.metadata(self._token, adapter_id)
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target) from error
