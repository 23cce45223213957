"""Prometheus metrics, and the small verbs by which engine and API feed them."""

import time
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from loraplex.engine.sequence import Timings
from loraplex.errors import StartupError

# Seconds. A step or one token: 1 ms on a GPU, seconds for a long prefill on a CPU.
_STEP_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
# Seconds. A whole request or a stage of it: from milliseconds in an idle server to many minutes.
_REQUEST_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0),
)
_COUNT_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


class Metrics:
    """Every metric of this server; histograms are labelled by model, never by adapter.

    Mutable: `_prefix_totals`, what was last told of the prefix cache.
    """

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._model = model
        self._add_request_metrics()
        self._add_engine_metrics()
        self._add_adapter_metrics()
        self._handled = Counter(
            "grpc_server_handled",
            "RPCs completed on the server, whatever their outcome.",
            ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
            registry=registry,
        )

    def _add_request_metrics(self) -> None:
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From the call's start to its first tokens."
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between tokens, as they leave.", _STEP_BUCKETS
        )
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "A request's mean after the first.", _STEP_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From start to last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Waiting to be admitted.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Admitted to first token.")
        self._decode = self._histogram("request_decode_time_seconds", "First to last token.")
        self._adapter_wait = self._histogram(
            "adapter_wait_seconds", "Requests waiting for their adapter to be resident."
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started requests.")
        self._generated = self._counter("generation_tokens", "Tokens sent to clients.")
        self._finished = self._counter(
            "request_finished", "Started requests by how they ended.", "reason"
        )
        self._rejected = self._counter(
            "requests_rejected", "Requests that never started.", "reason"
        )

    def _add_engine_metrics(self) -> None:
        self._step = self._histogram("engine_step_seconds", "One forward pass.", _STEP_BUCKETS)
        self._rows = self._histogram("batch_size", "Sequences in one pass.", _COUNT_BUCKETS)
        self._adapters = self._histogram(
            "batch_distinct_adapters", "Distinct adapters in one pass.", (0, *_COUNT_BUCKETS)
        )
        self._preemptions = self._counter("preemptions", "Sequences put back to wait for memory.")
        self._running = self._gauge("requests_running", "Requests being decoded or prefilled.")
        self._waiting = self._gauge("requests_waiting", "Requests not admitted yet.")
        self._blocks = self._gauge("memory_blocks", "Blocks of the arena by use.", "use")
        self._kv_usage = self._gauge(
            "kv_cache_usage_ratio",
            "Running requests' share of the blocks that adapters leave to KV.",
        )
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens of requests that looked for cached KV."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Of these, tokens whose KV was in the prefix cache."
        )
        self._prefix_totals = (0, 0)
        self._drafted = self._counter(
            "spec_decode_num_draft_tokens", "Tokens guessed for the model to verify."
        )
        self._accepted = self._counter(
            "spec_decode_num_accepted_tokens", "Of these, tokens that the model drew."
        )

    def _add_adapter_metrics(self) -> None:
        self._load = self._histogram("adapter_load_seconds", "Bringing an adapter to the device.")
        self._loads = self._counter("adapter_loads", "Adapter loads by result.", "result")
        self._resident = self._gauge("adapters_resident", "Adapters by tier.", "tier")
        self._evictions = self._counter(
            "adapter_evictions", "Adapters that made room for others, by tier.", "tier"
        )
        self._uploads = self._counter("adapter_uploads", "Uploads by gRPC code.", "code")

    def _histogram(
        self, name: str, text: str, buckets: Iterable[float] = _REQUEST_BUCKETS
    ) -> Histogram:
        family = Histogram(
            f"loraplex_{name}", text, ["model"], registry=self._registry, buckets=tuple(buckets)
        )
        return family.labels(self._model)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"loraplex_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"loraplex_{name}", text, labels, registry=self._registry)

    # The engine's.

    def observe_step(self, duration: float, num_rows: int, num_distinct_adapters: int) -> None:
        self._step.observe(duration)
        self._rows.observe(num_rows)
        self._adapters.observe(num_distinct_adapters)

    def drafted(self, num_tokens: int, num_accepted: int) -> None:
        self._drafted.inc(num_tokens)
        self._accepted.inc(num_accepted)

    def preempted(self, num_sequences: int) -> None:
        self._preemptions.inc(num_sequences)

    def set_load(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def set_memory(self, kv: int, cached: int, adapter: int, free: int) -> None:
        """Blocks of the arena by use; `cached` ones are as good as free to whoever needs them."""
        by_use = {"kv": kv, "cached": cached, "adapter": adapter, "free": free}
        for use, blocks in by_use.items():
            self._blocks.labels(use).set(blocks)
        available = kv + cached + free
        self._kv_usage.set(kv / available if available else 0.0)

    def set_prefix_cache(self, queries: int, hits: int) -> None:
        """Tokens since the start."""
        before, self._prefix_totals = self._prefix_totals, (queries, hits)
        self._prefix_queries.inc(queries - before[0])
        self._prefix_hits.inc(hits - before[1])

    def set_adapters_resident(self, device: int, host: int) -> None:
        self._resident.labels("device").set(device)
        self._resident.labels("host").set(host)

    def adapter_load(self, result: str, seconds: float) -> None:
        self._loads.labels(result).inc()
        self._load.observe(seconds)

    def adapters_evicted(self, tier: str, count: int) -> None:
        self._evictions.labels(tier).inc(count)

    # The API's.

    def request(self, num_prompt_tokens: int, started: float) -> "RequestMeter":
        """A meter for a request that starts now; `started` is when its call came in."""
        self._prompt_tokens.inc(num_prompt_tokens)
        return RequestMeter(self, started)

    def first_tokens(self, seconds: float, num_tokens: int) -> None:
        self._ttft.observe(seconds)
        self._generated.inc(num_tokens)

    def more_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` left together, `seconds` after those before them."""
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)
        self._generated.inc(num_tokens)

    def request_finished(self, e2e: float, per_token: float | None, timings: Timings) -> None:
        self._e2e.observe(e2e)
        if per_token is not None:
            self._per_token.observe(per_token)
        self._queue.observe(timings.queue)
        self._prefill.observe(timings.prefill)
        self._decode.observe(timings.decode)
        self._adapter_wait.observe(timings.adapter_wait)

    def request_ended(self, outcome: str) -> None:
        self._finished.labels(outcome).inc()

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def upload(self, code: str) -> None:
        self._uploads.labels(code).inc()

    def handled(self, grpc_type: str, service: str, method: str, code: str) -> None:
        """One RPC ended; the labels are go-grpc-prometheus's."""
        self._handled.labels(grpc_type, service, method, code).inc()


class RequestMeter:
    """One started request's measurements, taken as its deltas go out."""

    def __init__(
        self, metrics: Metrics, started: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._started = started
        self._clock = clock
        self._first: float | None = None
        self._last = started
        self._num_tokens = 0

    def tokens(self, num_tokens: int) -> None:
        """So many tokens leave now."""
        if num_tokens == 0:
            return
        now = self._clock()
        if self._first is None:
            self._first = now
            self._metrics.first_tokens(now - self._started, num_tokens)
        else:
            self._metrics.more_tokens(now - self._last, num_tokens)
        self._last = now
        self._num_tokens += num_tokens

    def finished(self, timings: Timings) -> None:
        """The request came to its own end; others would only mislead about latency."""
        per_token = None
        if self._first is not None and self._num_tokens > 1:
            per_token = (self._last - self._first) / (self._num_tokens - 1)
        self._metrics.request_finished(self._clock() - self._started, per_token, timings)

    def ended(self, outcome: str) -> None:
        """A finish reason, "cancelled" or "error"."""
        self._metrics.request_ended(outcome)


def serve_metrics(
    host: str, port: int, registry: CollectorRegistry
) -> tuple[int, Callable[[], None]]:
    """Serve the registry over HTTP from a thread; the port really bound, and how to stop."""
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        raise StartupError(
            f"cannot serve metrics on {host}:{port}: {error} (--metrics takes another, or off)"
        ) from error
    return server.server_port, lambda: _stop(server, thread.join)


def _stop(server: WSGIServer, join: Callable[[], None]) -> None:
    server.shutdown()
    server.server_close()
    join()
