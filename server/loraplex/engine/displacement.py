"""Whose place another one may have. Pure.

For one that waits at the head of the queue, a running one gives way that

    has a lower priority, or
    has the same, while its client holds more than its fair share of the places and the waiting
    one's less, and was served more by over `MAX_LEAD`

Fair admission alone is not enough: a client whose long answers hold all places would have the
others wait for their end. `MAX_LEAD` leaves the places that come free anyway the time to do it, and
`MAX_DISPLACED` has every sequence end.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from loraplex.engine.fair_share import FairShare
from loraplex.engine.sequence import Client, Sequence

MAX_LEAD = 1024.0
"""Of service, as `FairShare` counts it: the work of 512 generated tokens."""

MAX_DISPLACED = 2
"""So often one sequence is displaced for the sake of fair shares; the third time it stays."""


@dataclass(frozen=True, slots=True)
class Places:
    """Who holds how many of the places, and what else it has coming. Mutable: both, in a step."""

    fair: FairShare
    held: Counter[Client]
    pending: Counter[Client]  # prompt tokens of running ones that are still to be computed

    def take(self, client: Client) -> None:
        self.held[client] += 1

    def give_up(self, client: Client) -> None:
        self.held[client] -= 1
        if not self.held[client]:
            del self.held[client]

    @property
    def share(self) -> float:
        """A client's fair part of the places that are taken."""
        return self.held.total() / self.fair.num_clients

    def served(self, client: Client) -> float:
        """The client's service, with what its running prompts will take besides."""
        return self.fair.counters[client] + self.pending.get(client, 0)

    def may_any_displace(self, priority: int, running: Iterable[Sequence], least: float) -> bool:
        """Whether one of this priority, of a client that was served so little, could."""
        if any(sequence.priority < priority for sequence in running):
            return True
        share = self.share
        over = [self.served(client) for client, held in self.held.items() if held > share]
        return bool(over) and max(over) - least > MAX_LEAD

    def may_displace(self, waiting: Sequence, running: Sequence) -> bool:
        if waiting.priority != running.priority:
            return waiting.priority > running.priority
        held, share = self.held, self.share
        is_over, is_under = held[running.client] > share, held[waiting.client] < share
        if not is_over or not is_under or running.num_displaced >= MAX_DISPLACED:
            return False
        return self.served(running.client) - self.served(waiting.client) > MAX_LEAD

    def last(self, running: Iterable[Sequence]) -> Sequence:
        """The one that gives way first: of the lowest priority, of the client served most, and the
        newest, which has the least to be computed anew."""
        return max(
            enumerate(running),
            key=lambda entry: (-entry[1].priority, self.served(entry[1].client), entry[0]),
        )[1]
