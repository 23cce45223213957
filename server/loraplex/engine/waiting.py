"""Who waits for a place among the running, and in which order. Pure."""

from collections import Counter, deque
from collections.abc import Iterator, KeysView

from loraplex.engine.sequence import Sequence


class WaitingQueue:
    """Mutable: `_queue` in order, and `_demand`, how many of those waiting need each version."""

    def __init__(self) -> None:
        self._queue: deque[Sequence] = deque()
        self._demand = Counter[str]()

    def add(self, sequence: Sequence) -> None:
        self._queue.append(sequence)
        self._demand.update(sequence.versions)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran and had to give way: it is the next."""
        self._queue.appendleft(sequence)
        self._demand.update(sequence.versions)

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._demand.subtract(sequence.versions)
        for version in sequence.versions:
            if not self._demand[version]:
                del self._demand[version]

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they are to be admitted."""
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def needing(self, version: str) -> list[Sequence]:
        """Those whose adapters include it."""
        if version not in self._demand:
            return []
        return [sequence for sequence in self._queue if version in sequence.versions]

    @property
    def versions(self) -> KeysView[str]:
        """All adapter versions that they need, the one asked for first before the others."""
        return self._demand.keys()

    def demand(self, version: str) -> int:
        """How many need it."""
        return self._demand[version]

    def check_integrity(self) -> None:
        wanted = Counter(version for sequence in self._queue for version in sequence.versions)
        assert wanted == self._demand, "the demand is miscounted"
