"""Who waits for a place among the running, and in which order. Pure.

The higher priority goes first; within one, clients by the rank that the scheduler gives them; and
of one client the first come.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, KeysView
from heapq import heapify, heappop, heappush, nsmallest
from itertools import chain
from math import inf
from typing import TypeAlias, TypeVar

from loraplex.engine.sequence import Client, Sequence

Rank: TypeAlias = "tuple[float, ...]"
Ranking: TypeAlias = "Callable[[Client, Sequence], Rank]"
T = TypeVar("T")

MAX_CLIENTS = 256
"""So many of one priority are ranked for a step; the others have little hope of it."""


class WaitingQueue:
    """Mutable: `_queues` by priority and client; `_sizes`, how many of each client's wait, and
    `_demand`, how many need each version; `_timed`, those with a deadline, and `_earliest`, before
    which none of them is late."""

    def __init__(self) -> None:
        self._queues: dict[int, dict[Client, deque[Sequence]]] = {}
        self._sizes = Counter[Client]()
        self._demand = Counter[str]()
        self._timed: dict[Sequence, float] = {}
        self._earliest = inf
        self._length = 0

    def add(self, sequence: Sequence) -> None:
        self._queue_of(sequence).append(sequence)
        self._count(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran and had to give way: it is its client's next."""
        self._queue_of(sequence).appendleft(sequence)
        self._count(sequence)

    def remove(self, sequence: Sequence) -> None:
        clients = self._queues[sequence.priority]
        queue = clients[sequence.client]
        queue.remove(sequence)
        if not queue:
            del clients[sequence.client]
        if not clients:
            del self._queues[sequence.priority]
        self._length -= 1
        self._timed.pop(sequence, None)
        _subtract(self._sizes, sequence.client)
        for version in sequence.versions:
            _subtract(self._demand, version)

    def in_order(self, rank: Ranking, served: Callable[[Client], float]) -> Iterator[Sequence]:
        """The smallest rank of a client's first goes first; ranked anew when that was removed.

        One that is not removed before the next is asked for holds back its client's others: they
        have its priority and its adapters, and would get no further. Of many clients only those
        that were `served` least are looked at.
        """
        for priority in sorted(self._queues, reverse=True):
            clients = self._queues[priority]
            some: Iterable[Client] = clients
            if len(clients) > MAX_CLIENTS:
                some = nsmallest(MAX_CLIENTS, clients, key=served)
            heap = [(rank(one, clients[one][0]), index, one) for index, one in enumerate(some)]
            heapify(heap)
            while heap:
                _, index, client = heappop(heap)
                first = clients[client][0]
                yield first
                queue = clients.get(client)
                if queue and queue[0] is not first:
                    heappush(heap, (rank(client, queue[0]), index, client))

    def first(self, rank: Ranking) -> Sequence | None:
        """The one that comes first of `in_order`."""
        if not self._queues:
            return None
        clients = self._queues[max(self._queues)]
        client = min(clients, key=lambda client: rank(client, clients[client][0]))
        return clients[client][0]

    def late(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed, the earliest first."""
        if now < self._earliest:
            return []
        late = [sequence for sequence, deadline in self._timed.items() if deadline <= now]
        late.sort(key=self._timed.__getitem__)
        self._earliest = min(self._timed.values(), default=inf)
        return late

    def __iter__(self) -> Iterator[Sequence]:
        """By priority; clients in no order of meaning, each one's in their order."""
        for priority in sorted(self._queues, reverse=True):
            yield from chain.from_iterable(self._queues[priority].values())

    def __len__(self) -> int:
        return self._length

    @property
    def priority(self) -> int | None:
        """The highest of those that wait."""
        return max(self._queues, default=None)

    @property
    def clients(self) -> KeysView[Client]:
        """Those with a sequence that waits."""
        return self._sizes.keys()

    def count(self, client: Client) -> int:
        """How many of this client's wait."""
        return self._sizes.get(client, 0)

    def needing(self, version: str) -> list[Sequence]:
        """Those whose adapters include it."""
        if version not in self._demand:
            return []
        return [sequence for sequence in self if version in sequence.versions]

    @property
    def versions(self) -> KeysView[str]:
        """All adapter versions that they need, the one asked for first before the others."""
        return self._demand.keys()

    def demand(self, version: str) -> int:
        """How many need it."""
        return self._demand[version]

    def check_integrity(self) -> None:
        wanted = Counter(version for sequence in self for version in sequence.versions)
        assert wanted == self._demand, "the demand is miscounted"
        assert self._length == self._sizes.total(), "the queue's length is miscounted"
        assert Counter(sequence.client for sequence in self) == self._sizes, "miscounted clients"
        timed = {s: s.deadline for s in self if s.deadline is not None}
        assert timed == self._timed, "one with a deadline is not in the queue, or not watched"
        assert self._earliest <= min(timed.values(), default=inf), "a deadline would be missed"
        for priority, clients in self._queues.items():
            assert clients, "a priority without a client was kept"
            for client, queue in clients.items():
                assert queue, "a client without a sequence was kept"
                assert all((s.priority, s.client) == (priority, client) for s in queue), "misplaced"

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        clients = self._queues.setdefault(sequence.priority, {})
        return clients.setdefault(sequence.client, deque())

    def _count(self, sequence: Sequence) -> None:
        self._length += 1
        if sequence.deadline is not None:
            self._timed[sequence] = sequence.deadline
            self._earliest = min(self._earliest, sequence.deadline)
        self._sizes[sequence.client] += 1
        self._demand.update(sequence.versions)


def _subtract(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
