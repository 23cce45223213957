"""Blocking work off the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from loraplex.priority import give_way

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like asyncio.to_thread, but a caller that is cancelled still waits for the thread.

    So what the work uses stays the caller's until it is done, and can be cleaned up after it.
    """
    return await _in(None, partial(work, *args, **kwargs))


class Background:
    """Threads that give way to everything else, for what no running request waits for.

    Hashing, writing and validating an adapter takes as long as many steps. In threads of their
    own, so that a prompt to be tokenised never stands behind the disk.
    """

    def __init__(self, num_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "loraplex-background", give_way)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `in_thread`."""
        return await _in(self._threads, partial(work, *args, **kwargs))

    def close(self) -> None:
        """Waits for what runs."""
        self._threads.shutdown()


async def _in(threads: Executor | None, work: Callable[[], T]) -> T:
    """None: the event loop's own threads."""
    future = asyncio.get_running_loop().run_in_executor(threads, work)
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
