"""Which rows of a batch belong to which adapter, and how they are cut into tiles."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

NO_ADAPTER = -1
"""The slot of a row that runs on the bare base, in device tables and nowhere else."""

TILE_ROWS = 16
"""Rows of a short tile, which never crosses a multiple of this."""

LONG_TILE_ROWS = 64
"""Rows of a long tile; segments with more rows than this are cut into long tiles."""


class Segment(NamedTuple):
    """Rows `lo..hi` of a batch, all of one adapter slot. A tile is a piece of one."""

    slot: int
    lo: int
    hi: int


PADDING = Segment(NO_ADAPTER, 0, 0)
"""Fills a tile list up to its fixed capacity: a program that meets it returns."""


class Tiles(NamedTuple):
    """The rows with an adapter, cut into pieces that one program of a kernel works on.

    Every row with an adapter is in exactly one tile: in a short one when its segment has at most
    LONG_TILE_ROWS rows, in a long one otherwise. `starts[g]` is the first short tile of the rows
    from `TILE_ROWS * g` on, so that `starts[g]..starts[g + 1]` are those of one group of rows.
    """

    short: list[Segment]
    starts: list[int]  # [ceil(num_rows / TILE_ROWS) + 1]
    long: list[Segment]


def segments_of(slots: Iterable[int]) -> tuple[Segment, ...]:
    """The runs of equal slots in `slots`, one entry a row. Rows without an adapter are left out."""
    return tuple(segment for segment in _runs(slots) if segment.slot != NO_ADAPTER)


def tiles_of(segments: Iterable[Segment], num_rows: int) -> Tiles:
    """Cut the segments of a batch of `num_rows` rows, given in the order of their rows."""
    short: list[Segment] = []
    long: list[Segment] = []
    for segment in segments:
        if segment.hi - segment.lo > LONG_TILE_ROWS:
            long += _cut(segment, range(segment.lo, segment.hi, LONG_TILE_ROWS))
        else:
            first = segment.lo // TILE_ROWS * TILE_ROWS
            short += _cut(segment, range(first, segment.hi, TILE_ROWS))
    num_groups = -(-num_rows // TILE_ROWS)
    starts = [sum(tile.lo < TILE_ROWS * group for tile in short) for group in range(num_groups + 1)]
    return Tiles(short, starts, long)


def pad_tiles(tiles: Sequence[Segment], capacity: int) -> list[Segment]:
    """The list filled up to a capacity that it fits by construction."""
    assert len(tiles) <= capacity, f"{len(tiles)} tiles in a list of {capacity}"
    return [*tiles, *[PADDING] * (capacity - len(tiles))]


def _cut(segment: Segment, edges: range) -> Iterator[Segment]:
    for lo in edges:
        yield Segment(segment.slot, max(lo, segment.lo), min(lo + edges.step, segment.hi))


def _runs(slots: Iterable[int]) -> Iterator[Segment]:
    current, lo, row = NO_ADAPTER, 0, 0
    for row, slot in enumerate(slots, start=1):
        if slot != current:
            if row - 1 > lo:
                yield Segment(current, lo, row - 1)
            current, lo = slot, row - 1
    if row > lo:
        yield Segment(current, lo, row)
