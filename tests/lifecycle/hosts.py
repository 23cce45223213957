"""The server the machine plays with: in this process, or one of its own."""

import asyncio
import signal
import threading
from concurrent.futures import Future
from pathlib import Path

from loraplex.config import ServeConfig
from loraplex.engine.arena import Use
from loraplex.serve import running
from loraplex.startup import Base, plan_memory

from tests.e2e.servers import ServerFactory, ServerProcess, check_blobs


class InProcess:
    """The whole server on a thread; its base model is loaded already.

    Mutable: `target` and what runs behind it, new after a restart.
    """

    can_be_killed = False

    def __init__(self, config: ServeConfig, base: Base) -> None:
        self._config = config
        self._base = base
        self._memory = plan_memory(config, base)
        self.store = config.store
        self._start()

    def _start(self) -> None:
        self._ready: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self.target = f"127.0.0.1:{self._ready.result(60)}"

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with running(self._config, self._base, self._memory) as (port, self._engine):
                self._ready.set_result(port)
                await self._stopping.wait()
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def restart(self, *, kill: bool) -> None:
        self.close()
        self._start()

    def check_idle(self) -> None:
        checked = asyncio.run_coroutine_threadsafe(self._engine.check_integrity(), self._loop)
        checked.result(60)
        scheduler = self._engine._scheduler
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.arena.count(Use.KV) == 0
        check_blobs(self.store)

    def num_evicted(self) -> int:
        return self._engine._scheduler.pool.num_evicted

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()


class OwnProcess:
    """A `loraplex serve`. Mutable: `_server`, another one after a restart."""

    can_be_killed = True

    def __init__(self, factory: ServerFactory, store: Path, *flags: str) -> None:
        self._factory = factory
        self._flags = flags
        self.store = store
        self._server = self._start()

    @property
    def target(self) -> str:
        return self._server.target

    def _start(self) -> ServerProcess:
        return self._factory(*self._flags, store=self.store)

    def restart(self, *, kill: bool) -> None:
        if kill:
            self._server.process.kill()
            self._server.process.communicate()
        else:
            assert self._server.end(signal.SIGTERM) == 0
        self._server = self._start()

    def check_idle(self) -> None:
        self._server.eventually(self._server.is_idle)
        check_blobs(self.store)

    def num_evicted(self) -> int:
        return int(self._server.metric("adapter_evictions_total", tier="device"))

    def close(self) -> None:
        assert self._server.end(signal.SIGTERM) == 0
