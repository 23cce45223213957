"""Who of those that wait gets in, and whose adapters are brought to the device. Pure.

The order is told in the scheduler's docstring.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import islice

from loraplex.adapters.pool import Room
from loraplex.engine.fitting import refusal
from loraplex.engine.roster import Plan, Roster, needs
from loraplex.engine.sequence import Client, Sequence
from loraplex.engine.waiting import Rank, Ranking

NO_ROOM = Room(0, 0)

GROUPED = 512.0
"""Of service: clients that differ by less may be taken in the order that reads fewer adapters."""

HEADROOM = 4
"""One place in so many is left to clients that hold less than their fair share."""

HEADROOM_STEPS = 64
"""So many steps after one of those places was last taken by a client that held less than half its
share, a single one is left: places that nobody comes for are of use to those who wait."""


class Admission:
    """Works on the roster's books. Mutable: `_num_steps`, and `_last_needed`, the one in which such
    a client last took one of the places that were left to it."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._pool = roster.pool
        self._kv = roster.kv
        self._waiting = roster.waiting
        self._running = roster.running
        self._fair = roster.fair
        self._config = roster.config
        self._num_steps = 0
        self._last_needed = 0

    def in_order(self, plan: Plan) -> Iterator[Sequence]:
        """Those who wait, but one of each client until it was let in."""
        return self._waiting.in_order(self._ranking(plan), self._fair.counters.__getitem__)

    def _ranking(self, plan: Plan) -> Ranking:
        """The order among clients, as they get on in this step: see the scheduler's docstring."""
        served, held, is_ready = plan.places.served, plan.places.held, self._pool.is_ready
        least = min(map(served, self._waiting.clients), default=0.0)

        def rank(client: Client, first: Sequence) -> Rank:
            amount = served(client)
            digest = first.digest
            if digest is None or client in held or first.num_overtaken or not first.is_overtakable:
                distance = 0  # it adds no adapter to the step, or had to stand back enough
            else:
                distance = 1 if is_ready(digest) else 2
            return ((amount - least) // GROUPED, distance, amount)

        return rank

    def load_pinned(self, plan: Plan) -> bool:
        """Room for pinned adapters that are in host memory; False if one has to wait for it."""
        return all(
            self._load({version: num_blocks}, (), NO_ROOM, plan)
            for version in self._pool.missing_pins
            if (num_blocks := plan.size_of(version)) is not None
        )

    def admit(self, plan: Plan) -> None:
        self._num_steps += 1
        keep: set[str] = set()  # what those so far in the queue need
        claimed = NO_ROOM  # and what those of them who are passed over will take besides
        passed: list[Sequence] = []  # of them, those who wait for memory
        for sequence in self.in_order(plan):
            if plan.budget == 0 or self._roster.is_full:
                self._load_ahead(plan)
                return
            num_blocks = self._kv.blocks_for(sequence.num_tokens)
            if (error := refusal(sequence, num_blocks, self._pool, plan.size_of)) is not None:
                plan.failed.append((sequence, error))
                self._roster.abort(sequence)
                continue
            keep.update(needs(sequence))
            if not self._roster.has_adapters(sequence):
                has_room = self._bring(sequence, keep, claimed, plan)
            elif not self.may_start(sequence, plan):
                if not sequence.is_overtakable:
                    return
                continue
            elif has_room := self._start(sequence, keep, plan):
                for one in passed:
                    one.num_overtaken += 1
                continue
            if not sequence.is_overtakable:
                return
            if not has_room:
                # What others gave up for it is not for those behind it.
                if sequence is plan.asking or sequence.num_overtaken >= self._config.max_running:
                    return
                passed.append(sequence)
            claimed = self._claim(sequence, claimed, plan)

    def _start(self, sequence: Sequence, keep: set[str], plan: Plan) -> bool:
        limit, places = self._config.max_running, plan.places
        is_last = limit - len(self._running) <= _headroom(limit)
        is_under = 2 * places.held[sequence.client] * places.fair.num_clients < limit
        has_room = self._roster.start(sequence, keep, plan)
        if has_room and is_last and is_under:
            self._last_needed = self._num_steps
        return has_room

    def may_start(self, sequence: Sequence, plan: Plan) -> bool:
        """Whether it may have a place that is free, and would get any of this step's tokens."""
        before = [s for s in plan.prefilling if s.priority >= sequence.priority]
        num_tokens = sum(plan.prefilling[s] for s in before)
        if num_tokens >= plan.budget and any(s.client == sequence.client for s in before):
            return False
        return self._may_have_place(sequence, plan)

    def _may_have_place(self, sequence: Sequence, plan: Plan) -> bool:
        """Of clients with their share of places, the one served most leaves the last to others."""
        limit, places = self._config.max_running, plan.places
        headroom = _headroom(limit)
        if self._num_steps - self._last_needed > HEADROOM_STEPS:
            headroom = min(1, headroom)
        if limit - len(self._running) > headroom:
            return True
        if any(s.priority < sequence.priority for s in self._running):
            return True
        share = limit / places.fair.num_clients
        served = places.served(sequence.client)
        rivals = [client for client, held in places.held.items() if held >= share]
        return sequence.client not in rivals or served < max(map(places.served, rivals))

    def _load_ahead(self, plan: Plan) -> None:
        """Adapters of those who only wait for a place; nothing goes for it that anybody wants."""
        if all(map(self._pool.is_ready, self._waiting.versions)):
            return
        claimed = NO_ROOM
        for sequence in islice(self.in_order(plan), self._config.max_running):
            if not self._bring(sequence, self._waiting.versions, claimed, plan):
                return
            claimed = self._claim(sequence, claimed, plan)

    def _claim(self, sequence: Sequence, claimed: Room, plan: Plan) -> Room:
        """And what this one takes, beside adapters that have their room already."""
        num_blocks = self._kv.blocks_for(sequence.num_tokens)
        num_slots = int(bool(sequence.blend))
        for version in sequence.versions:
            if self._pool.get(version) is None and (size := plan.size_of(version)) is not None:
                num_blocks += size
                num_slots += 1
        return Room(claimed.blocks + num_blocks, claimed.slots + num_slots)

    def _bring(self, sequence: Sequence, keep: Collection[str], claimed: Room, plan: Plan) -> bool:
        """Room for those of its adapters that can be copied; False if there is none for them."""
        if plan.needy is None and not self._roster.has_adapters(sequence):
            plan.needy = sequence
        absent = {v: plan.size_of(v) for v in sequence.versions if self._pool.get(v) is None}
        sizes = {version: size for version, size in absent.items() if size is not None}
        return self._load(sizes, keep, claimed, plan)

    def _load(
        self, sizes: Mapping[str, int], keep: Collection[str], claimed: Room, plan: Plan
    ) -> bool:
        """All of them or none; and only beside what others claim, and a block for each running one.

        Else memory would fill with adapters that must go again before they are of use, or that
        drive out what runs.
        """
        if not sizes:
            return True
        room = self._pool.room(keep)
        blocks = len(self._running) + claimed.blocks + sum(sizes.values())
        if blocks > room.blocks or claimed.slots + len(sizes) > room.slots:
            return False
        for version, num_blocks in sizes.items():
            load = self._pool.reserve(version, num_blocks, keep)
            assert load is not None, "room was counted that is not there"
            plan.loads.append(load)
        return True

    def wanted(self, plan: Plan) -> tuple[list[str], list[str]]:
        """What must be read: for pins and the first in the queue; for others, most wanted first."""
        wanted, size_of = self._waiting.versions, plan.size_of
        missing = [v for v in wanted if self._pool.get(v) is None and size_of(v) is None]
        missing.sort(key=lambda version: -self._waiting.demand(version))
        urgent = [version for version in self._pool.missing_pins if size_of(version) is None]
        if missing:
            first = plan.needy or self._waiting.first(self._plain_rank)
            assert first is not None
            urgent += [v for v in first.versions if v in missing and v not in urgent]
        return urgent, [version for version in missing if version not in urgent]

    def wait_anew(self) -> None:
        """Those who have not begun, and lost an adapter that had come for them."""
        for sequence in self._waiting:
            if sequence.admitted_at is None and not self._roster.has_adapters(sequence):
                sequence.adapter_ready_at = None

    def _plain_rank(self, client: Client, first: Sequence) -> Rank:
        return (self._fair.counters[client],)


def _headroom(limit: int) -> int:
    """Of so many places, those that are left to others; none where there are few."""
    return limit // HEADROOM if limit >= 2 * HEADROOM else 0
