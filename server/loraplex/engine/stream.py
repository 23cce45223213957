"""A request's events on their way from the engine to its handler, on the event loop alone."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from loraplex.engine.sequence import Finished, Sequence, Timings, Tokens
from loraplex.errors import RequestError

Event = Tokens | Finished | RequestError


class TokenStream:
    """Async iterator of `Tokens`, then one `Finished`; raises the request's error, if any.

    Bounded: a reader that leaves `limit` tokens unread gets SLOW_READER, and `overflow` is called.
    Mutable: `_events`, not yet read, and `_unread`, the tokens in them; `_waiter`, what the reader
    waits for, which costs less at every token than an asyncio.Event.
    """

    def __init__(
        self,
        sequence: Sequence,
        limit: int,
        clock: Callable[[], float],
        overflow: Callable[[str], None],
    ) -> None:
        self.sequence = sequence
        self._limit = limit
        self._clock = clock
        self._overflow = overflow
        self._events: deque[Event] = deque()
        self._unread = 0
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def push(self, event: Event) -> None:
        if self._closed:
            return
        if isinstance(event, Tokens):
            self._unread += len(event.token_ids)
            if self._unread > self._limit:
                self._overflow(self.sequence.request_id)
                event = RequestError("SLOW_READER", f"{self._limit} tokens were left unread")
        self._closed = not isinstance(event, Tokens)
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def timings(self) -> Timings:
        return self.sequence.timings(self._clock())

    def __aiter__(self) -> AsyncIterator[Tokens | Finished]:
        return self._read()

    async def _read(self) -> AsyncIterator[Tokens | Finished]:
        loop = asyncio.get_running_loop()
        while True:
            while not self._events:
                self._waiter = loop.create_future()
                await self._waiter
            event = self._next()
            if isinstance(event, RequestError):
                raise event
            yield event
            if isinstance(event, Finished):
                return

    def _next(self) -> Event:
        """The next event; tokens that queued up come as one."""
        event = self._events.popleft()
        if not isinstance(event, Tokens):
            return event
        while self._events and isinstance(more := self._events[0], Tokens):
            self._events.popleft()
            event = Tokens(event.token_ids + more.token_ids, event.logprobs + more.logprobs)
        self._unread -= len(event.token_ids)
        return event
