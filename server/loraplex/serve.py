"""`loraplex serve`: build every part, hand each what it needs, run until told to stop."""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.packing import PackedAdapter
from loraplex.adapters.publisher import Publisher
from loraplex.adapters.store import AdapterStore
from loraplex.adapters.store_scrubber import Scrubber
from loraplex.api.server import ApiServer
from loraplex.config import Address, ServeConfig, format_size
from loraplex.engine.engine import Engine, EngineConfig
from loraplex.errors import LoraplexError, StartupError
from loraplex.metrics import Metrics, serve_metrics
from loraplex.observer import EngineObserver, StepLog
from loraplex.startup import (
    Base,
    Memory,
    build_host_tier,
    build_loader,
    build_runner,
    build_scheduler,
    describe,
    load_base,
    model_info,
    plan_memory,
    warn_of_little,
)

log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Blocks until SIGINT or SIGTERM; 0 after a clean end, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop_loading)
    base = load_base(config)
    memory = plan_memory(config, base)
    log.info(
        "memory: %d blocks of %s, %d tokens of KV each; context %d; host memory for adapters: %s",
        memory.num_blocks,
        format_size(memory.block.size),
        memory.block.tokens,
        base.config.context_length,
        format_size(memory.host_bytes),
    )
    warn_of_little(base, memory)
    return asyncio.run(_serve(config, base, memory))


def _stop_loading(received: int, frame: object) -> None:
    raise SystemExit("loraplex: stopped before it was ready")


async def _serve(config: ServeConfig, base: Base, memory: Memory) -> int:
    stopped = _on_signals()
    async with running(config, base, memory) as (bound, engine):
        listen = Address(config.listen.host, bound)
        # A full collection would walk torch's 200,000 objects, while every stream waits.
        gc.collect()
        gc.freeze()
        print(f"loraplex: serving {base.name} on {listen} ({describe(base, memory)})", flush=True)
        received = await _signal_or_crash(stopped, engine.crashed)
        log.info("%s: finishing what runs, then stopping", received.name)
    return 130 if received is signal.SIGINT else 0


async def _signal_or_crash(
    stopped: "asyncio.Future[signal.Signals]", crashed: asyncio.Event
) -> signal.Signals:
    crash = asyncio.ensure_future(crashed.wait())
    either: list[asyncio.Future[Any]] = [stopped, crash]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    crash.cancel()
    if not stopped.done():
        raise LoraplexError("the engine failed, and the log says why; the server ends")
    return stopped.result()


def _on_signals() -> "asyncio.Future[signal.Signals]":
    """The first signal to stop; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[signal.Signals] = loop.create_future()

    def stop(received: signal.Signals) -> None:
        if stopped.done():
            sys.stderr.write("loraplex: stopped at once\n")
            # A running forward pass cannot be interrupted, and nothing is half-written on disk.
            signal.signal(received, signal.SIG_DFL)
            signal.raise_signal(received)
        stopped.set_result(received)

    for wanted in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(wanted, stop, wanted)
    return stopped


class _Removals:
    """Hears of versions whose files go. Mutable: `listener`, once there is an engine to tell."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] | None = None

    def __call__(self, version: str) -> None:
        if self.listener is not None:
            self.listener(version)


@asynccontextmanager
async def running(
    config: ServeConfig, base: Base, memory: Memory
) -> AsyncIterator[tuple[int, Engine[PackedAdapter]]]:
    """The whole server: its port, its engine. Leaves nothing running and the store closed."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, base.name)
    async with AsyncExitStack() as stack:
        removed = _Removals()
        store = AdapterStore.open(
            config.store, base.identity, config.max_adapter_bytes, on_removed=removed
        )
        stack.callback(store.close)
        scrubber = Scrubber(store)
        scrubber.start()
        stack.callback(scrubber.stop)
        loader = build_loader(config, base, memory, store)
        stack.callback(loader.close)
        engine = _start_engine(config, base, memory, loader, metrics, stack)
        stack.push_async_callback(engine.stop)
        removed.listener = engine.forget
        publisher = Publisher(
            store, loader, base.linears, base.name, base.identity, config.max_rank
        )
        info = model_info(config, base, memory)
        api = ApiServer(engine, store, publisher, base.tokenizer, info, metrics)
        if config.metrics is not None:
            port, stop = serve_metrics(config.metrics.host, config.metrics.port, registry)
            stack.callback(stop)
            log.info("metrics on http://%s/metrics", Address(config.metrics.host, port))
        bound = await api.start(
            config.listen.host,
            config.listen.port,
            credentials=_credentials(config.tls_cert, config.tls_key),
            insecure=config.insecure,
        )
        stack.push_async_callback(api.drain, config.drain_seconds)
        yield bound, engine


def _start_engine(
    config: ServeConfig,
    base: Base,
    memory: Memory,
    loader: AdapterLoader,
    metrics: Metrics,
    stack: AsyncExitStack,
) -> Engine[PackedAdapter]:
    step_log = None
    if config.step_log is not None:
        step_log = StepLog(config.step_log)
        stack.callback(step_log.close)
    engine = Engine(
        build_scheduler(config, base, memory),
        build_runner(config, base, memory),
        loader,
        build_host_tier(base, memory),
        EngineObserver(metrics, step_log),
        EngineConfig(max_live=config.max_running + config.max_waiting),
    )
    engine.start()
    return engine


def _credentials(cert: Path | None, key: Path | None) -> grpc.ServerCredentials | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise StartupError("--tls-cert and --tls-key go together")
    pair = (_read("--tls-key", key), _read("--tls-cert", cert))
    return grpc.ssl_server_credentials([pair])


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{option} {path}: {error.strerror}") from None
