"""Which adapters are in device memory, in which slot, and who uses them. Copies nothing."""

from dataclasses import dataclass, field

from loraplex.engine.arena import Arena, Use


@dataclass(slots=True)
class Resident:
    """One adapter version that has a slot and blocks, its weights there or on their way."""

    digest: str
    slot: int
    blocks: list[int]
    ready: bool = False
    references: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Work for the caller: bring this version's weights into these blocks."""

    digest: str
    slot: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class AdapterPool:
    """Slots and blocks of resident adapters, referenced by the sequences that use them.

    Mutable: `_residents` in order of last use, `_free_slots`. Idle adapters stay until their room
    is wanted; those in use are never moved.
    """

    arena: Arena
    num_slots: int
    _residents: dict[str, Resident] = field(default_factory=dict)
    _free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots - 1, -1, -1))

    def get(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    def reserve(self, digest: str, num_blocks: int) -> Load | None:
        """Room for a version that is not here, evicting idle ones; None if there is not enough."""
        assert digest not in self._residents
        if not self._make_room(num_blocks):
            return None
        blocks = self.arena.allocate(num_blocks, Use.ADAPTER)
        assert blocks is not None
        resident = Resident(digest, self._free_slots.pop(), blocks)
        self._residents[digest] = resident
        return Load(digest, resident.slot, tuple(blocks))

    def loaded(self, digest: str) -> None:
        self._residents[digest].ready = True

    def drop(self, digest: str) -> None:
        """Give an unreferenced version's slot and blocks back."""
        resident = self._residents.pop(digest)
        assert resident.references == 0, f"{digest} is dropped while in use"
        self.arena.free(resident.blocks)
        self._free_slots.append(resident.slot)

    def acquire(self, digest: str) -> int:
        """One more reference to a ready version; its slot."""
        resident = self._residents.pop(digest)
        assert resident.ready, f"{digest} is used before it is loaded"
        self._residents[digest] = resident  # now the most recently used
        resident.references += 1
        return resident.slot

    def release(self, digest: str) -> None:
        resident = self._residents[digest]
        assert resident.references > 0, f"{digest} is released more often than acquired"
        resident.references -= 1

    def evict_idle(self) -> bool:
        """Drop the least recently used version that nobody uses; False if there is none."""
        for resident in self._residents.values():
            if resident.ready and resident.references == 0:
                self.drop(resident.digest)
                return True
        return False

    @property
    def num_ready(self) -> int:
        return sum(1 for resident in self._residents.values() if resident.ready)

    @property
    def is_loading(self) -> bool:
        """Whether an adapter is on its way; once here, it can be evicted like any other."""
        return any(not resident.ready for resident in self._residents.values())

    def check_integrity(self) -> None:
        slots = [resident.slot for resident in self._residents.values()] + self._free_slots
        assert sorted(slots) == list(range(self.num_slots)), "a slot is lost or used twice"
        held = sum(len(resident.blocks) for resident in self._residents.values())
        assert held == self.arena.count(Use.ADAPTER), "adapter blocks and residents disagree"

    def _make_room(self, num_blocks: int) -> bool:
        while not self._free_slots or self.arena.num_free < num_blocks:
            if not self.evict_idle():
                return False
        return True

    def __repr__(self) -> str:
        rows = ", ".join(
            f"{r.digest[:8]}@{r.slot}x{r.references}" + ("" if r.ready else " loading")
            for r in self._residents.values()
        )
        return f"AdapterPool({len(self._residents)}/{self.num_slots}: {rows})"
