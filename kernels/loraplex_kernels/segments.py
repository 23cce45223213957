"""Which rows of a batch belong to which adapter."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

NO_ADAPTER = -1
"""The slot of a row that runs on the bare base, in device tables and nowhere else."""


class Segment(NamedTuple):
    """Rows `lo..hi` of a batch, all of one adapter slot."""

    slot: int
    lo: int
    hi: int


def segments_of(slots: Iterable[int]) -> tuple[Segment, ...]:
    """The runs of equal slots in `slots`, one entry a row. Rows without an adapter are left out."""
    return tuple(segment for segment in _runs(slots) if segment.slot != NO_ADAPTER)


def _runs(slots: Iterable[int]) -> Iterator[Segment]:
    current, lo, row = NO_ADAPTER, 0, 0
    for row, slot in enumerate(slots, start=1):
        if slot != current:
            if row - 1 > lo:
                yield Segment(current, lo, row - 1)
            current, lo = slot, row - 1
    if row > lo:
        yield Segment(current, lo, row)
