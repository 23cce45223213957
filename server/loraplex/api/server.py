"""The gRPC server around the two services: start, health, reflection, drain."""

import asyncio
import ipaddress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from loraplex_protos.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from loraplex.api.adapters import AdapterServicer
from loraplex.api.calls import Calls
from loraplex.api.inference import InferenceServicer
from loraplex.api.interceptors import Boundary
from loraplex.api.pins import Pins
from loraplex.api.protocols import (
    EngineLike,
    ModelInfo,
    PublisherLike,
    StoreLike,
    TokenizerLike,
)
from loraplex.api.receiving import Receiver
from loraplex.api.threads import Background
from loraplex.config import Address
from loraplex.errors import StartupError
from loraplex.metrics import Metrics

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)

_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients ping as well
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server behind it
)
_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
_LAST_WORDS = 2.0  # seconds, for the statuses of calls that a drain cut off, and open watches


class ApiServer:
    """Serves over gRPC what it is given. Built on the event loop that will run it."""

    def __init__(
        self,
        engine: EngineLike,
        store: StoreLike,
        publisher: PublisherLike,
        tokenizer: TokenizerLike,
        model: ModelInfo,
        metrics: Metrics,
        *,
        stall_seconds: float = 30.0,
    ) -> None:
        self._calls = Calls()
        self._background = Background()
        max_rank = model.limits.max_rank
        self._pins = Pins(engine, store, self._background, max_rank)
        self._restoring: asyncio.Task[None] | None = None  # from start to drain
        receiver = Receiver(
            store, publisher, self._pins, self._background, model.base_id, stall_seconds
        )
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[Boundary(frozenset(SERVICES), self._calls, metrics)], options=_OPTIONS
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            InferenceServicer(engine, store, tokenizer, model, metrics), self._server
        )
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(  # type: ignore[no-untyped-call]
            AdapterServicer(engine, store, receiver, self._pins, self._background, max_rank),
            self._server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._add_reflection()

    async def start(
        self,
        host: str,
        port: int,
        *,
        credentials: grpc.ServerCredentials | None = None,
        insecure: bool = False,
    ) -> int:
        """Listen; the port really bound. Beyond this machine only with TLS, or if told so."""
        bound = self._bind(host, port, credentials, insecure)
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._restoring = asyncio.create_task(self._pins.restore())
        return bound

    async def drain(self, grace: float) -> None:
        """Refuse new calls, give those that run `grace` seconds, and stop."""
        await self._health.enter_graceful_shutdown()
        self._calls.drain()
        if not await self._calls.idle(grace):
            self._calls.expel()
            await self._calls.idle(_LAST_WORDS)
        await self._server.stop(_LAST_WORDS)
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.wait([self._restoring])
        await asyncio.to_thread(self._background.close)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()

    def _bind(
        self, host: str, port: int, credentials: grpc.ServerCredentials | None, insecure: bool
    ) -> int:
        address = str(Address(host, port))
        if credentials is None and not insecure and not is_loopback(host):
            raise StartupError(
                f"{address} can be reached from other machines:"
                " give --tls-cert and --tls-key, or say --insecure"
            )
        try:
            if credentials is not None:
                return self._server.add_secure_port(address, credentials)
            return self._server.add_insecure_port(address)
        except RuntimeError:
            cause = "the port is in use" if credentials is None else "port in use, or bad TLS files"
            raise StartupError(
                f"cannot listen on {address} ({cause}? --listen takes another)"
            ) from None

    def _add_reflection(self) -> None:
        """Under both of its names: v1 is v1alpha renamed, and the library has only the latter."""
        names = (*SERVICES, health.SERVICE_NAME, _REFLECTION_V1, reflection.SERVICE_NAME)
        servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]
        handler = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
                for name in (_REFLECTION_V1, reflection.SERVICE_NAME)
            ]
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name that is not known is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
