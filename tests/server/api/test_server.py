"""Start, health, reflection and drain of the real server."""

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from loraplex.api.server import is_loopback
from loraplex.errors import StartupError
from loraplex_protos.v1 import inference_pb2

from tests.server.api.conftest import say

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "loraplex.v1.InferenceService", "loraplex.v1.AdapterService")


async def health(api: "Api", service: str) -> int:
    check = health_pb2_grpc.HealthStub(api.channel).Check
    answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


def test_health_of_the_server_and_both_services(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        assert [await health(api, service) for service in SERVICES] == [SERVING] * 3
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(api, "nope")
        assert caught.value.code() is StatusCode.NOT_FOUND

    serve(scenario)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_knows_the_services_and_their_files(serve: "Serve", version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICES[2]),
    ]

    async def scenario(api: "Api") -> None:
        method = api.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, file = [answer async for answer in method(requests, timeout=10)]
        names = {service.name for service in listed.list_services_response.service}
        assert {*SERVICES[1:], "grpc.health.v1.Health"} <= names
        assert file.file_descriptor_response.file_descriptor_proto

    serve(scenario)


def test_a_drain_lets_running_calls_finish_and_refuses_new_ones(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        running = aiter(api.generate(request_id="r", text="x"))
        await anext(running)
        drain = asyncio.ensure_future(api.server.drain(10))
        while await health(api, "") != NOT_SERVING:
            await asyncio.sleep(0.01)
        assert [await health(api, service) for service in SERVICES] == [NOT_SERVING] * 3
        refused = [
            await api.stream_failure(api.generate(text="x")),
            await api.failure(api.unary("GetServerInfo", inference_pb2.GetServerInfoRequest())),
        ]
        for error in refused:
            assert (error.code, error.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
            assert error.retry_after
        for event in say("done"):
            api.engine.streams["r"].push(event)
        rest = [event async for event in running]
        assert rest[-1].finished.usage.completion_tokens == 4
        await asyncio.wait_for(drain, 5)
        assert api.sample("loraplex_requests_rejected_total", reason="DRAINING") == 1

    serve(scenario)


def test_a_drain_cuts_off_what_outlives_its_grace(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        running = aiter(api.generate(request_id="r", text="x"))
        await anext(running)
        drain = asyncio.ensure_future(api.server.drain(0.1))
        error = await api.stream_failure(running)
        assert (error.code, error.reason) == (StatusCode.UNAVAILABLE, "DRAINING")
        assert api.engine.aborted == ["r"]
        await asyncio.wait_for(drain, 5)

    serve(scenario)


def test_a_watched_server_drains_too(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        watch = health_pb2_grpc.HealthStub(api.channel).Watch
        statuses = aiter(watch(health_pb2.HealthCheckRequest(), timeout=20))
        assert (await anext(statuses)).status == SERVING
        await asyncio.wait_for(api.server.drain(10), 8)
        assert (await anext(statuses)).status == NOT_SERVING
        with contextlib.suppress(grpc.aio.AioRpcError, StopAsyncIteration):
            await anext(statuses)

    serve(scenario)


def test_a_port_in_use_is_one_clear_error(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        port = int(api.target.rpartition(":")[2])
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"):
            await api.another().start("127.0.0.1", port)

    serve(scenario)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
def test_beyond_this_machine_only_when_told_so(serve: "Serve", host: str) -> None:
    async def scenario(api: "Api") -> None:
        with pytest.raises(StartupError, match="--insecure"):
            await api.another().start(host, 0)

    serve(scenario)


def test_insecure_is_believed(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        server = api.another()
        port = await server.start("0.0.0.0", 0, insecure=True)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        await server.drain(1)

    serve(scenario)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_tls_files_that_are_none(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        credentials = grpc.ssl_server_credentials([(b"no key", b"no certificate")])
        with pytest.raises(StartupError, match="bad TLS files"):
            await api.another().start("127.0.0.1", 0, credentials=credentials)

    serve(scenario)


def test_credentials_open_the_way_beyond_this_machine(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        server = api.another()
        credentials = grpc.local_server_credentials()  # like TLS, but with no certificate to make
        port = await server.start("0.0.0.0", 0, credentials=credentials)
        trusted = grpc.local_channel_credentials()
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusted) as channel:
            check: Any = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == SERVING
        await server.drain(1)

    serve(scenario)
