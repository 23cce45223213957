"""Who may join the queue, and how long that would take to come to a first token. Pure.

The queue is shared by dynamic thresholds: Choudhury and Hahne, "Dynamic Queue Length Thresholds for
Shared-Memory Packet Switches" (1998). Of a client as many may wait as `PER_FREE` times what is
still free of the queue, so that one alone may fill most of it, and never all of more than four
places. Those count as waiting that go beyond the client's share of the places to run, or beyond
what others leave of them.

A wait is estimated from the work of those who have no first token yet and the rate at which the
engine gets through work while there is a queue. Under fair share a newcomer has before it what its
own client has queued, and as much of every other client's.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import exp

from loraplex.engine.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from loraplex.engine.sequence import Client, Sequence
from loraplex.errors import RequestError

PER_FREE = 4

MEMORY = 10.0
"""Seconds over which the rate is averaged."""

MAX_SECONDS = MEMORY / 4
"""No step counts as longer, so that one alone does not make the rate."""

MIN_SECONDS = 1.0
MIN_FINISHED = 8
"""So much time with a queue, and so many requests that ended, make an estimate."""

OPTIMISM = 0.5
"""A deadline is taken for out of reach where such a part of the estimated wait would pass it."""

MIN_RETRY, MAX_RETRY = 1.0, 60.0  # seconds


@dataclass(frozen=True, slots=True)
class _Entry:
    """A request that has no first token yet."""

    client: Client
    priority: int
    work: float


class Intake:
    """Mutable: `_live`, requests here by client; `_queued`, those without a token; the averages."""

    def __init__(self, max_live: int, max_running: int) -> None:
        self._max_live = max_live
        self._max_running = max_running
        self._live = Counter[Client]()
        self._num_live = 0
        self._queued: dict[Sequence, _Entry] = {}
        self._amount = 0.0  # of service, and the time it took; both fade
        self._seconds = 0.0
        self._num_finished = 0
        self._mean_output = 0.0

    def enter(self, sequence: Sequence, now: float) -> None:
        """Raises QUEUE_FULL, DEADLINE_EXCEEDED or DEADLINE_UNREACHABLE, and then it is not here."""
        self._check_room(sequence)
        if sequence.deadline is not None:
            self._check_deadline(sequence, sequence.deadline - now)
        self._live[sequence.client] += 1
        self._num_live += 1
        work = PROMPT_WEIGHT * len(sequence.prompt_token_ids)
        work += OUTPUT_WEIGHT * min(sequence.stop.max_tokens, self._mean_output)
        self._queued[sequence] = _Entry(sequence.client, sequence.priority, work)

    def began(self, sequence: Sequence) -> None:
        """It has a token. Idempotent."""
        self._queued.pop(sequence, None)

    def leave(self, sequence: Sequence, num_output: int | None = None) -> None:
        """It is here no more; `num_output`: it came to its own end, after so many tokens."""
        self._queued.pop(sequence, None)
        self._num_live -= 1
        self._live[sequence.client] -= 1
        if not self._live[sequence.client]:
            del self._live[sequence.client]
        if num_output is not None:
            self._num_finished += 1
            weight = max(0.02, 1 / self._num_finished)
            self._mean_output += weight * (num_output - self._mean_output)

    def served(self, amount: float, seconds: float) -> None:
        """The engine did so much in so long, while somebody waited."""
        counted = min(seconds, MAX_SECONDS)
        fading = exp(-counted / MEMORY)
        self._amount = fading * self._amount + amount * (counted / seconds)
        self._seconds = fading * self._seconds + counted

    def wait(self, sequence: Sequence) -> float | None:
        """Seconds until it has a token, if it came now; None: too little is known."""
        if self._num_live < self._max_running:
            return 0.0
        if self._seconds < MIN_SECONDS or self._num_finished < MIN_FINISHED or not self._amount:
            return None
        ahead = 0.0  # whatever happens
        queued = defaultdict[Client, float](float)
        for entry in self._queued.values():
            if entry.priority > sequence.priority:
                ahead += entry.work
            elif entry.priority == sequence.priority:
                queued[entry.client] += entry.work
        own = queued.pop(sequence.client, 0.0)
        turn = own + PROMPT_WEIGHT * len(sequence.prompt_token_ids)
        ahead += own + sum(min(work, turn) for work in queued.values())
        return ahead * self._seconds / self._amount

    def _check_room(self, sequence: Sequence) -> None:
        free = self._max_live - self._num_live
        if free <= 0:
            raise self._full("too many requests are waiting (--max-waiting)", sequence)
        if self._num_live >= self._max_running and self._beyond(sequence.client) >= PER_FREE * free:
            whose = "this adapter" if sequence.digest is not None else "the base model"
            raise self._full(
                f"too many requests for {whose} are waiting; others may come", sequence
            )

    def _beyond(self, client: Client) -> float:
        """How many of the client's requests are more than its places."""
        own = self._live[client]
        num_clients = len(self._live) + (own == 0)
        left = self._max_running - (self._num_live - own)
        return own - max(left, self._max_running / num_clients)

    def _full(self, message: str, sequence: Sequence) -> RequestError:
        wait = self.wait(sequence) or 0.0
        return RequestError(
            "QUEUE_FULL", message, retry_after=round(min(MAX_RETRY, max(MIN_RETRY, wait)), 1)
        )

    def _check_deadline(self, sequence: Sequence, left: float) -> None:
        if left <= 0:
            raise RequestError("DEADLINE_EXCEEDED", "the call's deadline has passed")
        wait = self.wait(sequence)
        if wait is not None and OPTIMISM * wait > left:
            raise RequestError(
                "DEADLINE_UNREACHABLE",
                f"the first token is about {wait:.0f} s away, and the deadline {left:.1f} s",
            )
