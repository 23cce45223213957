"""Which adapters are in device memory, in which slot, and who uses them. Copies nothing.

    loading    has a slot and blocks, its weights on their way; nobody may use it or take its room
    in use     loaded, with references: the running sequences that read it
    idle       loaded, without references; it stays until somebody wants its room
    pinned     never gives its room up, whoever wants it; may also not be here yet

A blend has a slot alone: its rows in the device's tables point into its members' blocks. So it can
be here only while they are, and goes when one of them goes.

Idle adapters and the KV of cached prefixes (`prefixes`) make room together: what was not used for
longest goes first, a prefix's age counted as prefix_cache.py says, and what somebody waits for
last. Were all adapters to go before prefixes, KV that nobody will ever read would drive out what is
asked for all the time; were prefixes to go first, none would outlive a flood of adapters.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import islice

from loraplex.engine.arena import Arena, Use
from loraplex.engine.prefix_cache import PrefixCache

NOTHING: frozenset[str] = frozenset()


@dataclass(slots=True)
class Resident:
    """One adapter version with a slot and blocks, or one blend with a slot. See the module."""

    digest: str
    slot: int
    blocks: list[int]
    members: tuple[str, ...] = ()  # a blend's; their references include its own
    ready: bool = False
    references: int = 0
    forgotten: bool = False  # goes with its last reference
    last_use: int = 0  # of the arena


@dataclass(frozen=True, slots=True)
class Load:
    """Work for the caller: bring this version's weights into these blocks."""

    digest: str
    slot: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bind:
    """Work for the caller, before the next step: make `slot` the weighted sum of other slots."""

    slot: int
    members: tuple[tuple[int, float], ...]  # (slot, weight)


@dataclass(frozen=True, slots=True)
class Room:
    """So many blocks and slots."""

    blocks: int
    slots: int


@dataclass(slots=True)
class _Pin:
    """Names that want one version to stay, and what it takes."""

    num_blocks: int
    owners: set[str]
    is_sought: bool = True  # False: it could not be brought here, and nobody tries for its sake


@dataclass(slots=True)
class AdapterPool:
    """Slots and blocks of what is resident, referenced by the sequences that use it; and pins.

    Mutable: `_residents` in order of last use, `_free_slots`, `_pins` by version, `num_evicted`,
    versions that had to make room since the start, `awaited`, as its owner changes it, and
    `prefixes`, whose idle blocks count as room.
    """

    arena: Arena
    num_slots: int
    awaited: Collection[str] = NOTHING  # versions that somebody waits for: they make room last
    num_evicted: int = 0
    prefixes: PrefixCache = field(init=False)
    _residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)
    _free_slots: list[int] = field(default_factory=list)
    _pins: dict[str, _Pin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots - 1, -1, -1))
        self.prefixes = PrefixCache(self.arena)

    def get(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    def num_blocks_of(self, digest: str) -> int | None:
        """What a version takes that is here or pinned; None: it is neither."""
        if (resident := self._residents.get(digest)) is not None:
            return len(resident.blocks)
        pin = self._pins.get(digest)
        return None if pin is None else pin.num_blocks

    def is_ready(self, digest: str) -> bool:
        resident = self._residents.get(digest)
        return resident is not None and resident.ready

    def reserve(self, digest: str, num_blocks: int, keep: Collection[str] = NOTHING) -> Load | None:
        """Room for a version that is not here; idle ones go, but for those in `keep`.

        None, and nothing changed, if there is not enough.
        """
        assert digest not in self._residents
        if self.make_room(num_blocks, 1, keep) is None:
            return None
        blocks = self.arena.allocate(num_blocks, Use.ADAPTER)
        assert blocks is not None
        resident = Resident(digest, self._free_slots.pop(), blocks)
        self._residents[digest] = resident
        self._touch(resident)
        return Load(digest, resident.slot, tuple(blocks))

    def loaded(self, digest: str) -> None:
        resident = self._residents[digest]
        resident.ready = True
        if pin := self._pins.get(digest):
            pin.is_sought = True
        self._let_go(resident)

    def bind(
        self, digest: str, parts: Iterable[tuple[str, float]], keep: Collection[str] = NOTHING
    ) -> Bind | None:
        """A slot for a blend of versions that are all ready; None if there is none to be had."""
        assert digest not in self._residents
        weights = dict(parts)
        members = [self._residents[version] for version in weights]
        assert all(member.ready for member in members), "a blend is bound before its members"
        if self.make_room(0, 1, {*keep, *weights}) is None:
            return None
        slot = self._free_slots.pop()
        blend = Resident(digest, slot, [], tuple(weights), ready=True)
        self._residents[digest] = blend
        self._touch(blend)
        return Bind(slot, tuple((member.slot, weights[member.digest]) for member in members))

    def acquire(self, digest: str) -> int:
        """One more reference to what is ready, and to a blend's members; its slot."""
        resident = self._residents[digest]
        for one in self._with_members(resident):
            assert one.ready, f"{one.digest} is used before it is loaded"
            one.references += 1
            self._touch(one)
        return resident.slot

    def release(self, digest: str) -> None:
        released = self._with_members(self._residents[digest])
        for one in released:
            assert one.references > 0, f"{one.digest} is released more often than acquired"
            one.references -= 1
            self._touch(one)
        for one in released:
            self._let_go(one)

    def drop(self, digest: str) -> None:
        """Give an unreferenced version's slot and blocks back, and the slots of its blends."""
        for resident in self._with_blends(self._residents[digest]):
            assert resident.references == 0, f"{resident.digest} is dropped while in use"
            del self._residents[resident.digest]
            self.arena.free(resident.blocks)
            self._free_slots.append(resident.slot)
            if resident.forgotten:
                self.prefixes.forget(resident.digest)

    def forget(self, digest: str) -> None:
        """Nobody will ask for this version again: it goes at once, or with its last use.

        So does the KV that was computed with it.
        """
        self._pins.pop(digest, None)
        resident = self._residents.get(digest)
        if resident is None:
            self.prefixes.forget(digest)
        else:
            resident.forgotten = True
            self._let_go(resident)

    def make_room(
        self, num_blocks: int, num_slots: int = 0, keep: Collection[str] = NOTHING
    ) -> tuple[str, ...] | None:
        """So much free, what is idle dropped for it in the module's order, but none of `keep`.

        Where slots are missing blends go first, as they can be bound again at no cost.
        The versions and blends that went; None, and nothing changed, if all that is idle together
        would not be enough.
        """
        blocks = num_blocks - self.arena.num_free  # still missing
        slots = num_slots - len(self._free_slots)
        if blocks <= 0 and slots <= 0:
            return ()
        chosen = self._choose(blocks, slots, keep)
        blocks -= sum(len(resident.blocks) for resident in chosen.values())
        if blocks > self.prefixes.num_idle or slots > len(chosen):
            return None
        self.prefixes.evict(max(0, blocks))
        for digest, resident in chosen.items():
            self.num_evicted += not resident.members
            if digest in self._residents:  # not gone with one of its members
                self.drop(digest)
        return tuple(chosen)

    def _choose(self, blocks: int, slots: int, keep: Collection[str]) -> dict[str, Resident]:
        """Those that go so that so much is free, besides prefixes that go before them."""
        uses = list(islice(self.prefixes.idle_uses(), max(0, blocks)))
        chosen: dict[str, Resident] = {}
        gained = 0
        for resident in sorted(self._residents.values(), key=self._reluctance):
            is_awaited = resident.digest in self.awaited
            before = len(uses) if is_awaited else bisect_left(uses, resident.last_use)
            if gained + before >= blocks and len(chosen) >= slots:
                break
            gives = bool(resident.blocks) or len(chosen) < slots  # a blend has no block to give
            if resident.digest in chosen or not gives or not self._may_go(resident, keep):
                continue
            for one in self._with_blends(resident):
                if one.digest not in chosen:
                    chosen[one.digest] = one
                    gained += len(one.blocks)
        return chosen

    def room(self, keep: Collection[str]) -> Room:
        """What is free, or would be without what is idle and not in `keep`."""
        going = [one for one in self._residents.values() if self._may_go(one, keep)]
        blocks = sum(len(one.blocks) for one in going) + self.prefixes.num_idle
        return Room(self.arena.num_free + blocks, len(self._free_slots) + len(going))

    # Pins.

    def pin(self, digest: str, owner: str, num_blocks: int) -> bool:
        """Keep a version for one more owner; False if all pins would exceed `pin_limit`."""
        pin = self._pins.get(digest)
        if pin is None:
            pinned, limit = self.pinned_room(), self.pin_limit
            if pinned.blocks + num_blocks > limit.blocks or pinned.slots == limit.slots:
                return False
            pin = self._pins[digest] = _Pin(num_blocks, set())
        pin.owners.add(owner)
        pin.is_sought = True
        return True

    def unpin(self, digest: str, owner: str) -> None:
        pin = self._pins.get(digest)
        if pin is not None:
            pin.owners.discard(owner)
            if not pin.owners:
                del self._pins[digest]

    def is_pinned(self, digest: str) -> bool:
        return digest in self._pins

    def give_up(self, digest: str) -> None:
        """It cannot be brought here: its pins wait until somebody else's load succeeds."""
        if pin := self._pins.get(digest):
            pin.is_sought = False

    @property
    def missing_pins(self) -> list[str]:
        """Pinned versions that are to be brought here and are not on their way yet."""
        residents = self._residents
        return [v for v, pin in self._pins.items() if pin.is_sought and v not in residents]

    @property
    def pin_limit(self) -> Room:
        """What all pins may take: half of everything."""
        return Room(self.arena.num_blocks // 2, self.num_slots // 2)

    def pinned_room(self, but: Collection[str] = NOTHING) -> Room:
        """What all pins but those of `but` take, those not here yet included."""
        sizes = [pin.num_blocks for version, pin in self._pins.items() if version not in but]
        return Room(sum(sizes), len(sizes))

    # Sight.

    @property
    def num_ready(self) -> int:
        """Versions that can be used; blends are not counted."""
        return sum(1 for one in self._residents.values() if one.ready and not one.members)

    def references(self) -> Counter[str]:
        return Counter({one.digest: one.references for one in self._residents.values()})

    @property
    def is_loading(self) -> bool:
        """Whether an adapter is on its way; once here, it can be evicted like any other."""
        return any(not resident.ready for resident in self._residents.values())

    def check_integrity(self) -> None:
        residents = self._residents
        slots = [resident.slot for resident in residents.values()] + self._free_slots
        assert sorted(slots) == list(range(self.num_slots)), "a slot is lost or used twice"
        held = sum(len(resident.blocks) for resident in residents.values())
        assert held == self.arena.count(Use.ADAPTER), "adapter blocks and residents disagree"
        for resident in residents.values():
            assert bool(resident.blocks) != bool(resident.members), "a blend holds blocks"
            for member in resident.members:
                assert self.is_ready(member), "a blend outlived a member"
                assert residents[member].references >= resident.references, "a member is miscounted"
            gone = resident.ready and not resident.references and resident.forgotten
            assert not gone, "a forgotten version was kept"
        pinned, limit = self.pinned_room(), self.pin_limit
        within = pinned.blocks <= limit.blocks and pinned.slots <= limit.slots
        assert within, "pins hold more than half"
        assert all(pin.owners for pin in self._pins.values()), "a pin without an owner"

    def __repr__(self) -> str:
        rows = [_row(one, one.digest in self._pins) for one in self._residents.values()]
        absent = [digest for digest in self._pins if digest not in self._residents]
        rows += [f"{digest[:8]} pinned, not here" for digest in absent]
        return f"AdapterPool({len(self._residents)}/{self.num_slots}: {', '.join(rows)})"

    def _may_go(self, resident: Resident, keep: Collection[str]) -> bool:
        """Whether it is idle, and nobody asks for it to stay."""
        if not resident.ready or resident.references:
            return False
        return resident.digest not in keep and resident.digest not in self._pins

    def _touch(self, resident: Resident) -> None:
        resident.last_use = self.arena.next_use()
        self._residents.move_to_end(resident.digest)

    def _reluctance(self, resident: Resident) -> tuple[bool, bool]:
        return not resident.members, resident.digest in self.awaited

    def _with_members(self, resident: Resident) -> list[Resident]:
        return [*(self._residents[member] for member in resident.members), resident]

    def _with_blends(self, resident: Resident) -> list[Resident]:
        """It, and the blends that would point to nothing without it."""
        digest = resident.digest
        return [resident, *(one for one in self._residents.values() if digest in one.members)]

    def _let_go(self, resident: Resident) -> None:
        if resident.forgotten and resident.ready and not resident.references:
            self.drop(resident.digest)


def _row(resident: Resident, is_pinned: bool) -> str:
    members = "+".join(member[:8] for member in resident.members)
    notes = [f"({members})"] if members else []
    notes += [] if resident.ready else ["loading"]
    notes += ["pinned"] if is_pinned else []
    notes += ["forgotten"] if resident.forgotten else []
    return " ".join([f"{resident.digest[:8]}@{resident.slot}x{resident.references}", *notes])
