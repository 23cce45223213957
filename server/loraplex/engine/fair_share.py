"""Who was served how much: the virtual token counter of each client. Pure.

Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). Every client has a counter
that grows with the service it gets, and the one with the smallest goes first. A client that had
nobody waiting and comes again is lifted to the smallest counter of those who wait, so that nobody
saves up a share that went unused; where nobody waits, to the counter of the last who did.

A client is a tenant with one adapter version, or the members of a blend; the bare base is a client
like any other.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from loraplex.engine.sequence import Client

PROMPT_WEIGHT = 1.0
"""Of a prompt token that is computed; one whose KV was there already costs nothing."""

OUTPUT_WEIGHT = 2.0
"""Of a generated token."""

CREDIT = 1024.0
"""Of service: so much of an unused share is kept, for requests that come in bursts."""

MAX_IDLE = 1024
"""So many clients are remembered that have no request here."""


class FairShare:
    """Mutable: `_counters` of those with a request here and `_live`, how many each has; `_idle`,
    the counters of others, those gone longest first; `_floor`, what a client is lifted to where
    nobody waits."""

    def __init__(self) -> None:
        self._counters: dict[Client, float] = {}
        self._live: dict[Client, int] = {}
        self._idle: OrderedDict[Client, float] = OrderedDict()
        self._floor = 0.0

    @property
    def num_clients(self) -> int:
        """Those with a request here."""
        return len(self._counters)

    @property
    def counters(self) -> Mapping[Client, float]:
        """Of those with a request here."""
        return self._counters

    def enter(self, client: Client, waiting: Iterable[Client]) -> None:
        """One more request, which waits; `waiting`: the clients of those that wait already."""
        if client not in self._counters:
            self._counters[client] = self._idle.pop(client, 0.0)
            self._live[client] = 0
        self._live[client] += 1
        others = list(waiting)
        if client in others:
            return
        least = min((self._counters[one] for one in others), default=self._floor)
        self._counters[client] = max(self._counters[client], least - CREDIT)

    def last_left(self, client: Client) -> None:
        """Nobody of this client's waits any more."""
        self._floor = max(self._floor, self._counters[client])

    def leave(self, client: Client) -> None:
        """One request less."""
        self._live[client] -= 1
        if self._live[client]:
            return
        del self._live[client]
        self._idle[client] = self._counters.pop(client)
        if len(self._idle) > MAX_IDLE:
            self._idle.popitem(last=False)

    def charge(self, client: Client, num_prompt: int, num_output: int) -> None:
        self._counters[client] += PROMPT_WEIGHT * num_prompt + OUTPUT_WEIGHT * num_output

    def check_integrity(self, live: Mapping[Client, int]) -> None:
        """`live`: how many requests of each client are here."""
        assert live == self._live, "requests are miscounted"
        assert self._counters.keys() == self._live.keys(), "a client has no counter, or two"
        assert not self._counters.keys() & self._idle.keys(), "a client is here and gone"

    def __repr__(self) -> str:
        rows = [
            f"{tenant}/{'+'.join(version[:8] for version in versions) or '-'} {counter:.0f}"
            for (tenant, versions), counter in self._counters.items()
        ]
        return f"FairShare({', '.join(rows)})"
