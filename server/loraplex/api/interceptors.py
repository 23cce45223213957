"""The boundary around every handler: bytes become messages, errors become statuses.

It is the one place that parses, answers errors, counts and logs calls. Handlers get a parsed
message and a `Call`, return or yield messages, and raise RequestError.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.message import Message
from grpc import StatusCode

from loraplex.api.calls import Call, Calls, draining
from loraplex.api.parsing import check_routing, parse
from loraplex.api.status import code_label, status_of
from loraplex.api.validation import is_request_id
from loraplex.errors import RequestError
from loraplex.metrics import Metrics

_LOG = logging.getLogger(__name__)

_SERVER_STREAM = (False, True)
_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    _SERVER_STREAM: "server_stream",
    (True, True): "bidi_stream",
}
"""(request streams, response streams) as go-grpc-prometheus calls them."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Boundary(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps the handlers of our own services; health and reflection pass as they are."""

    def __init__(self, services: frozenset[str], calls: Calls, metrics: Metrics) -> None:
        self._services = services
        self._calls = calls
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or service not in self._services:
            return handler
        rpc = _Rpc(service, method, handler, self._calls, self._metrics)
        serializer = handler.response_serializer
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(rpc.unary_stream, None, serializer)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(rpc.stream_unary, None, serializer)
        return grpc.unary_unary_rpc_method_handler(rpc.unary_unary, None, serializer)


class _Rpc:
    """A servicer's method for messages, made a handler of raw bytes."""

    def __init__(
        self, service: str, method: str, handler: Handler, calls: Calls, metrics: Metrics
    ) -> None:
        self._service = service
        self._method = method
        self._deserialize: Any = handler.request_deserializer
        self._handle: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary
        self._streams = (handler.request_streaming, handler.response_streaming)
        self._calls = calls
        self._metrics = metrics

    async def unary_unary(self, data: bytes, context: Context) -> Message:
        async with self._answered(context) as call:
            request = self._parsed(data, context, call)
            response: Message = await self._handle(request, call)
            await _open(context, call)
            return response

    async def unary_stream(self, data: bytes, context: Context) -> None:
        async with self._answered(context) as call:
            request = self._parsed(data, context, call)
            async with aclosing(self._handle(request, call)) as responses:
                async for response in responses:
                    await _open(context, call)
                    await context.write(response)

    async def stream_unary(self, stream: AsyncIterator[bytes], context: Context) -> Message:
        async with self._answered(context) as call:
            requests = self._each_parsed(stream, context, call)
            async with aclosing(requests):
                response: Message = await self._handle(requests, call)
            await _open(context, call)
            return response

    async def _each_parsed(
        self, stream: AsyncIterator[bytes], context: Context, call: Call
    ) -> AsyncGenerator[Message, None]:
        async for data in stream:
            yield self._parsed(data, context, call)

    def _parsed(self, data: bytes, context: Context, call: Call) -> Message:
        message: Message = parse(self._deserialize, data)
        if is_request_id(request_id := getattr(message, "request_id", "")):
            call.request_id = request_id
        check_routing(message, context.invocation_metadata() or ())
        return message

    @asynccontextmanager
    async def _answered(self, context: Context) -> AsyncIterator[Call]:
        """Whatever is raised within becomes the call's one status, one count and one log line."""
        call = Call(self._method, time_left=context.time_remaining())
        code = StatusCode.UNKNOWN
        try:
            self._calls.enter(call)
            yield call
            code = StatusCode.OK
        except (asyncio.CancelledError, Exception) as raised:
            error = self._as_request_error(raised, call)
            if error is None:
                code = _cancel_code(context)
                raise
            code = error.code
            if not call.opened and self._streams == _SERVER_STREAM:
                self._metrics.rejected(error.reason.name)
            call.note(reason=error.reason.name)
            await _abort(context, error, call)
        finally:
            self._calls.leave(call)
            self._report(call, code)

    def _as_request_error(self, raised: BaseException, call: Call) -> RequestError | None:
        """The answer to what was raised; None where nobody is left to hear one."""
        match raised:
            case RequestError() if raised.reason.name != "INTERNAL":
                return raised
            case asyncio.CancelledError():
                return draining() if self._calls.was_expelled(call) else None
            case grpc.aio.BaseError():  # the transport is gone in the middle of a write
                return None
        _LOG.error(
            "internal error request_id=%s method=%s", call.request_id, self._method, exc_info=raised
        )
        return RequestError("INTERNAL", f"internal error (request_id {call.request_id})")

    def _report(self, call: Call, code: StatusCode) -> None:
        label = code_label(code)
        self._metrics.handled(_TYPES[self._streams], self._service, self._method, label)
        if self._method == "UploadAdapter":
            self._metrics.upload(label)
        facts = "".join(f" {key}={value}" for key, value in call.facts.items())
        _LOG.info(
            "call request_id=%s method=%s code=%s seconds=%.3f%s",
            *(call.request_id, self._method, label, call.seconds, facts),
        )


async def _open(context: Context, call: Call) -> None:
    """Headers go out with the first answer, not before: an error alone can still be retried."""
    if not call.opened:
        await context.send_initial_metadata((("x-request-id", call.request_id),))
        call.opened = True


async def _abort(context: Context, error: RequestError, call: Call) -> NoReturn:
    status = status_of(error, call.request_id)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _cancel_code(context: Context) -> StatusCode:
    remaining = context.time_remaining()
    expired = remaining is not None and remaining <= 0
    return StatusCode.DEADLINE_EXCEEDED if expired else StatusCode.CANCELLED
