"""Blocking work off the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from loraplex.priority import give_way

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Threads that give way to everything else, for what no running request waits for.

    Hashing, writing and validating an adapter takes as long as many steps. In threads of their
    own, so that a prompt to be tokenised never stands behind the disk.
    """

    def __init__(self, num_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "loraplex-background", give_way)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like asyncio.to_thread, but a caller that is cancelled still waits for the thread.

        So what the work uses stays the caller's until it is done, and can be cleaned up after it.
        """
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._threads, partial(work, *args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue
            if not future.cancelled():
                future.exception()  # nobody is left to hear of it
            raise

    def close(self) -> None:
        """Waits for what runs."""
        self._threads.shutdown()
