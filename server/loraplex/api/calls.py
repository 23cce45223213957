"""The calls under way: what a handler knows about its own, and how a drain ends all of them."""

import asyncio
import time
import uuid

from loraplex.errors import RequestError


class Call:
    """One RPC as its handler sees it. Mutable: `opened`, and `facts`, which grow for the log."""

    def __init__(
        self, method: str, request_id: str | None = None, time_left: float | None = None
    ) -> None:
        """`time_left`: seconds until the caller's deadline; None: there is none."""
        self.method = method
        self.request_id = request_id or uuid.uuid4().hex
        self.started = time.monotonic()
        self.deadline = None if time_left is None else self.started + time_left
        self.opened = False  # the response's headers are out: the request was accepted
        self.facts: dict[str, object] = {}

    def note(self, **facts: object) -> None:
        """Facts for the log: identities and counts that were checked, never a prompt's text."""
        self.facts |= facts

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Calls:
    """Lets calls in until the drain begins, and tells when the last one has gone."""

    def __init__(self) -> None:
        self._tasks: dict[Call, asyncio.Task[object]] = {}
        self._expelled: set[Call] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self, call: Call) -> None:
        """Raises DRAINING once `drain` was called."""
        if self._draining:
            raise draining()
        task = asyncio.current_task()
        assert task is not None
        self._tasks[call] = task
        self._idle.clear()

    def leave(self, call: Call) -> None:
        self._tasks.pop(call, None)
        self._expelled.discard(call)
        if not self._tasks:
            self._idle.set()

    def drain(self) -> None:
        self._draining = True

    async def idle(self, seconds: float) -> bool:
        """Whether all calls ended within so many seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def expel(self) -> None:
        """Cancel what still runs; `was_expelled` tells it from a client's own cancel."""
        for call, task in self._tasks.items():
            self._expelled.add(call)
            task.cancel()

    def was_expelled(self, call: Call) -> bool:
        return call in self._expelled

    def __repr__(self) -> str:
        return f"<Calls active={len(self._tasks)} draining={self._draining}>"


def draining() -> RequestError:
    return RequestError("DRAINING", "the server is shutting down", retry_after=1.0)
