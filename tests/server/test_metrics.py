"""Names and labels are the contract's; what is measured is what happened."""

import re
import urllib.request
from collections.abc import Iterator

import pytest
from loraplex.engine.sequence import Timings
from loraplex.errors import StartupError
from loraplex.metrics import Metrics, RequestMeter, serve_metrics
from prometheus_client import CollectorRegistry, generate_latest

MODEL = {"model": "m"}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "adapter_wait_seconds",
    "adapter_load_seconds",
    "engine_step_seconds",
    "batch_size",
    "batch_distinct_adapters",
}
GAUGES: dict[str, tuple[str, ...]] = {
    "requests_running": (),
    "requests_waiting": (),
    "kv_cache_usage_ratio": (),
    "adapters_resident": ("tier",),
    "memory_blocks": ("use",),
}
COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": (),
    "generation_tokens": (),
    "preemptions": (),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "spec_decode_num_draft_tokens": (),
    "spec_decode_num_accepted_tokens": (),
    "request_finished": ("reason",),
    "requests_rejected": ("reason",),
    "adapter_loads": ("result",),
    "adapter_uploads": ("code",),
    "adapter_evictions": ("tier",),
}
GRPC = ("grpc_type", "grpc_service", "grpc_method", "grpc_code")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> Metrics:
    return Metrics(registry, "m")


def feed(metrics: Metrics) -> None:
    """Every verb once, so that every family has a sample."""
    metrics.observe_step(0.02, 8, 3)
    metrics.preempted(2)
    metrics.drafted(8, 5)
    metrics.set_load(running=8, waiting=2)
    metrics.set_memory(kv=30, cached=20, adapter=10, free=40)
    metrics.set_prefix_cache(queries=50, hits=16)
    metrics.set_prefix_cache(queries=70, hits=32)
    metrics.set_adapters_resident(device=3, host=4)
    metrics.adapter_load("ok", 0.5)
    metrics.adapters_evicted("host", 2)
    metrics.rejected("QUEUE_FULL")
    metrics.upload("OK")
    metrics.handled("unary", "s", "m", "OK")
    metrics.request(5, 0.0).ended("length")


def test_names_types_and_labels(metrics: Metrics, registry: CollectorRegistry) -> None:
    feed(metrics)
    found = {
        (family.type, family.name): {
            tuple(sorted(set(sample.labels) - {"le"})) for sample in family.samples
        }
        for family in registry.collect()
    }
    expected: dict[tuple[str, str], set[tuple[str, ...]]]
    expected = {("histogram", f"loraplex_{name}"): {("model",)} for name in HISTOGRAMS}
    expected |= {("gauge", f"loraplex_{name}"): {labels} for name, labels in GAUGES.items()}
    expected |= {("counter", f"loraplex_{name}"): {labels} for name, labels in COUNTERS.items()}
    expected[("counter", "grpc_server_handled")] = {tuple(sorted(GRPC))}
    assert found == expected


def test_values(metrics: Metrics, registry: CollectorRegistry) -> None:
    feed(metrics)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("loraplex_batch_size_sum", **MODEL) == 8
    assert value("loraplex_batch_distinct_adapters_sum", **MODEL) == 3
    assert value("loraplex_preemptions_total") == 2
    assert value("loraplex_spec_decode_num_draft_tokens_total") == 8
    assert value("loraplex_spec_decode_num_accepted_tokens_total") == 5
    assert value("loraplex_requests_running") == 8
    assert value("loraplex_requests_waiting") == 2
    assert value("loraplex_memory_blocks", use="adapter") == 10
    assert value("loraplex_memory_blocks", use="cached") == 20
    assert value("loraplex_kv_cache_usage_ratio") == pytest.approx(30 / 90)
    assert value("loraplex_prefix_cache_queries_total") == 70
    assert value("loraplex_prefix_cache_hits_total") == 32
    assert value("loraplex_adapters_resident", tier="device") == 3
    assert value("loraplex_adapters_resident", tier="host") == 4
    assert value("loraplex_adapter_loads_total", result="ok") == 1
    assert value("loraplex_adapter_evictions_total", tier="host") == 2
    assert value("loraplex_prompt_tokens_total") == 5
    assert value("loraplex_request_finished_total", reason="length") == 1
    metrics.set_memory(kv=0, cached=0, adapter=5, free=0)
    assert value("loraplex_kv_cache_usage_ratio") == 0


def test_a_request_is_measured_as_its_tokens_leave(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    times: Iterator[float] = iter([12.0, 12.5, 13.5, 14.0])
    meter = RequestMeter(metrics, started=10.0, clock=lambda: next(times))
    for num_tokens in (1, 1, 2, 0):
        meter.tokens(num_tokens)
    meter.finished(Timings(queue=0.5, prefill=1.5, decode=1.5, adapter_wait=0.25))

    def measured(name: str) -> tuple[float | None, float | None]:
        count = registry.get_sample_value(f"loraplex_{name}_count", MODEL)
        return count, registry.get_sample_value(f"loraplex_{name}_sum", MODEL)

    assert measured("time_to_first_token_seconds") == (1, 2.0)
    assert measured("inter_token_latency_seconds") == (3, 1.5)
    assert measured("time_per_output_token_seconds") == (1, 0.5)
    assert measured("e2e_request_latency_seconds") == (1, 4.0)
    assert measured("request_queue_time_seconds") == (1, 0.5)
    assert measured("adapter_wait_seconds") == (1, 0.25)
    assert registry.get_sample_value("loraplex_generation_tokens_total") == 4


def test_a_request_of_one_token_has_no_time_between_tokens(
    metrics: Metrics, registry: CollectorRegistry
) -> None:
    meter = metrics.request(3, 0.0)
    meter.tokens(1)
    meter.finished(Timings())
    name = "loraplex_time_per_output_token_seconds_count"
    assert registry.get_sample_value(name, MODEL) == 0


def test_served_over_http_and_stopped(metrics: Metrics, registry: CollectorRegistry) -> None:
    metrics.set_load(running=7, waiting=0)
    port, stop = serve_metrics("127.0.0.1", 0, registry)
    url = f"http://127.0.0.1:{port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        assert re.search(r"^loraplex_requests_running 7\.0$", text, re.MULTILINE)
        with pytest.raises(StartupError, match=rf"metrics on 127.0.0.1:{port}: .*\(--metrics"):
            serve_metrics("127.0.0.1", port, registry)
    finally:
        stop()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_nothing_is_registered_globally() -> None:
    for _ in range(2):
        Metrics(CollectorRegistry(), "m")
    assert b"loraplex" not in generate_latest()
