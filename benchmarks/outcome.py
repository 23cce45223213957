"""One request sent, and its stream written down."""

import time
from contextlib import aclosing
from dataclasses import dataclass, field

from loraplex_client import AsyncClient, Delta, LoraplexError, Started, Timings
from workload import Request


@dataclass(frozen=True, slots=True)
class Asking:
    """How a request is put, beside what the workload says."""

    temperature: float = 0.0
    timeout: float | None = None  # seconds


@dataclass(slots=True)
class Outcome:
    """One request's course, in seconds of `time.monotonic`, which processes of one machine share.

    Grows while its tokens arrive.
    """

    request: Request
    due: float  # what its latencies count from; in a closed loop when its client was free
    sent: float | None = None  # None: it waits for a place among those that may run
    ended: float | None = None  # None: it was cut off
    arrivals: list[float] = field(default_factory=list)  # when tokens came
    counts: list[int] = field(default_factory=list)  # how many at each of them
    cached_tokens: int = 0  # of the prompt
    timings: Timings | None = None  # the server's, once it has finished
    error: str | None = None  # the gRPC code and, where the server said one, the reason

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    @property
    def is_complete(self) -> bool:
        return self.ended is not None and self.error is None

    @property
    def first_token(self) -> float:
        """Seconds from being due to the first token, which has come."""
        return self.arrivals[0] - self.due

    def tokens_between(self, begin: float, end: float) -> int:
        """Generated ones that arrived then."""
        arrived = zip(self.arrivals, self.counts, strict=True)
        return sum(count for moment, count in arrived if begin <= moment < end)


async def ask(client: AsyncClient, outcome: Outcome, asking: Asking) -> None:
    """Send its request and fill it in; a LoraplexError is written down and raised."""
    request, clock = outcome.request, time.monotonic
    arrived, counted = outcome.arrivals.append, outcome.counts.append
    outcome.sent = clock()
    stream = client.stream(
        token_ids=request.token_ids,
        adapter_id=request.adapter or "",
        priority=request.priority,
        max_tokens=request.max_tokens,
        ignore_eos=True,
        temperature=asking.temperature,
        repetition_penalty=1.0,
        timeout=asking.timeout,
    )
    try:
        async with aclosing(stream) as events:
            async for event in events:
                if isinstance(event, Delta):
                    if event.token_ids:
                        arrived(clock())
                        counted(len(event.token_ids))
                elif isinstance(event, Started):
                    outcome.cached_tokens = event.cached_tokens
                else:
                    outcome.timings = event.timings
    except LoraplexError as error:
        outcome.error = " ".join(filter(None, (error.code.name, error.reason)))
        outcome.ended = clock()
        raise
    outcome.ended = clock()
