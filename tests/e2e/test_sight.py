"""What an operator sees: metrics, logs, health, reflection."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from loraplex_client import Client, InvalidArgument

if TYPE_CHECKING:
    from tests.e2e.servers import ServerProcess

SERVICES = ("loraplex.v1.InferenceService", "loraplex.v1.AdapterService")
ONCE_A_STEP = ("engine_step_seconds", "batch_size", "batch_distinct_adapters")
HISTOGRAMS = (
    *("time_to_first_token_seconds", "time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "adapter_wait_seconds"),
    *ONCE_A_STEP,
)
GAUGES = (
    *("requests_running", "requests_waiting", "kv_cache_usage_ratio"),
    *("memory_blocks", "adapters_resident"),
)
COUNTERS = ("prompt_tokens_total", "generation_tokens_total", "request_finished_total")


@pytest.fixture
def channel(server: "ServerProcess") -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.target) as channel:
        yield channel


def test_metrics_tell_what_was_done(server: "ServerProcess", client: Client) -> None:
    server.eventually(server.is_idle)
    before = server.samples()
    completion = client.complete("The sea", max_tokens=3, ignore_eos=True)
    with pytest.raises(InvalidArgument):
        client.complete("The sea", top_p=2.0)
    server.eventually(server.is_idle)
    after = server.samples()

    def grown(name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return after[key] - before.get(key, 0.0)

    for name in HISTOGRAMS:
        count = grown(f"loraplex_{name}_count", model="smollm2-135m-instruct")
        assert count == (3 if name in ONCE_A_STEP else 1), name
    assert "loraplex_inter_token_latency_seconds_count" in {name for name, _ in after}
    assert grown("loraplex_prompt_tokens_total") == completion.usage.prompt_tokens
    assert grown("loraplex_generation_tokens_total") == 3
    assert grown("loraplex_request_finished_total", reason="length") == 1
    assert grown("loraplex_requests_rejected_total", reason="INVALID_FIELD") == 1
    generate = {"grpc_service": SERVICES[0], "grpc_method": "Generate"}
    generate |= {"grpc_type": "server_stream"}
    assert grown("grpc_server_handled_total", grpc_code="OK", **generate) == 1
    assert grown("grpc_server_handled_total", grpc_code="InvalidArgument", **generate) == 1
    names = {name for name, _ in after}
    assert {f"loraplex_{name}" for name in (*GAUGES, *COUNTERS)} <= names
    uses = [("loraplex_memory_blocks", frozenset({("use", u)})) for u in ("kv", "adapter", "free")]
    assert after[uses[0]] == 0
    assert sum(after[use] for use in uses) == sum(before[use] for use in uses) > 0


def test_no_histogram_knows_an_adapter(server: "ServerProcess") -> None:
    labels = {frozenset(dict(pairs)) for name, pairs in server.samples() if "_bucket" in name}
    assert labels == {frozenset({"model", "le"})}


def test_logs_hold_request_ids_and_no_text(server: "ServerProcess", client: Client) -> None:
    secret = "xylophone-quarrel"
    prompts = (
        {"prompt": f"Tell nobody: {secret}", "stop": secret},
        {"messages": [{"role": "user", "content": f"And {secret}?"}]},
    )
    for index, prompt in enumerate(prompts):
        request_id = f"quiet-{index}"
        client.complete(**prompt, max_tokens=2, request_id=request_id)  # type: ignore[arg-type]
        _, line = server.logged(request_id)
        assert " method=Generate code=OK " in line
    client.tokenize(secret)
    with pytest.raises(InvalidArgument):
        client.complete(secret, stop=[secret] * 17)
    assert "xylophone" not in server.log()


def test_health(channel: grpc.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICES):
        response = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_contract(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {*SERVICES, "grpc.health.v1.Health"} <= set(database.get_services())
    file = database.FindFileContainingSymbol("loraplex.v1.InferenceService")
    assert [method.name for method in file.service[0].method] == [
        "Generate",
        "Tokenize",
        "GetServerInfo",
    ]


def test_reflection_answers_to_its_newer_name(channel: grpc.Channel) -> None:
    ask = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert set(SERVICES) <= {s.name for s in answer.list_services_response.service}
