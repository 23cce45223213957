"""Where an adapter version lies, and the middle one of the three places: host memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Generic, Protocol, TypeVar


class Tier(Enum):
    """The fastest place that holds a version."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class Sized(Protocol):
    """A packed adapter, as far as the host tier looks."""

    @property
    def num_bytes(self) -> int: ...


P = TypeVar("P", bound=Sized)


def num_bytes(packed: Sized) -> int:
    return packed.num_bytes


class HostTier(Generic[P]):
    """Packed adapters in host memory, least recently used first out, within a budget of bytes.

    What somebody waits for is kept even beyond the budget, until `trim` finds it unwanted; how much
    of that there may be is for whoever reads ahead to decide.
    Mutable: `_held`, in order of last use, and `num_bytes` of them. The engine thread's.
    """

    def __init__(self, max_bytes: int, weigh: Callable[[P], int] = num_bytes) -> None:
        """`weigh`: the bytes that one takes where it is kept."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._weigh = weigh
        self._held: OrderedDict[str, P] = OrderedDict()

    def __contains__(self, version: str) -> bool:
        return version in self._held

    def __len__(self) -> int:
        return len(self._held)

    def peek(self, version: str) -> P | None:
        return self._held.get(version)

    def get(self, version: str) -> P | None:
        """And it is now the most recently used."""
        if version in self._held:
            self._held.move_to_end(version)
        return self._held.get(version)

    def put(self, version: str, packed: P) -> None:
        """Hold it, as the most recently used; `trim` afterwards."""
        self.drop(version)
        self._held[version] = packed
        self.num_bytes += self._weigh(packed)

    def drop(self, version: str) -> None:
        packed = self._held.pop(version, None)
        if packed is not None:
            self.num_bytes -= self._weigh(packed)

    def has_room_beside(self, versions: Iterable[str]) -> bool:
        """Whether the budget allows for more than those of these that are here."""
        held = (packed for version in versions if (packed := self._held.get(version)))
        return sum(map(self._weigh, held)) < self.max_bytes

    @property
    def is_over(self) -> bool:
        return self.num_bytes > self.max_bytes

    def trim(self, is_wanted: Callable[[str], bool]) -> tuple[str, ...]:
        """Back within the budget, as far as what nobody wants allows; the versions that went."""
        gone: list[str] = []
        if self.is_over:
            # What exceeds the budget alone goes first, and not all others in its stead.
            order = sorted(self._held, key=self._fits)
            for version in order:
                if self.is_over and not is_wanted(version):
                    self.drop(version)
                    gone.append(version)
        return tuple(gone)

    def check_integrity(self) -> None:
        held = sum(map(self._weigh, self._held.values()))
        assert held == self.num_bytes, "host memory is miscounted"

    def __repr__(self) -> str:
        held = ", ".join(f"{v[:8]} {self._weigh(packed)}" for v, packed in self._held.items())
        return f"HostTier({self.num_bytes}/{self.max_bytes} bytes: {held})"

    def _fits(self, version: str) -> bool:
        return self._weigh(self._held[version]) <= self.max_bytes
