"""Segments are the runs of equal slots, without the rows that have none; tiles are their pieces."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels.segments import (
    LONG_TILE_ROWS,
    NO_ADAPTER,
    PADDING,
    TILE_ROWS,
    Segment,
    pad_tiles,
    segments_of,
    tiles_of,
)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([], []),
        ([-1], []),
        ([-1, -1, -1], []),
        ([0], [(0, 0, 1)]),
        ([3, 3, 3], [(3, 0, 3)]),
        ([-1, 2], [(2, 1, 2)]),
        ([2, -1], [(2, 0, 1)]),
        ([0, 1, 2], [(0, 0, 1), (1, 1, 2), (2, 2, 3)]),
        ([-1, 0, 0, -1, 0, 5], [(0, 1, 3), (0, 4, 5), (5, 5, 6)]),
    ],
)
def test_runs(slots: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert segments_of(slots) == tuple(Segment(*run) for run in expected)


@settings(deadline=None)
@given(st.lists(st.integers(NO_ADAPTER, 3), max_size=40))
def test_segments_say_what_the_rows_said(slots: list[int]) -> None:
    segments = segments_of(iter(slots))
    rebuilt = [NO_ADAPTER] * len(slots)
    for slot, lo, hi in segments:
        assert slot != NO_ADAPTER
        assert lo < hi
        rebuilt[lo:hi] = [slot] * (hi - lo)
    assert rebuilt == slots
    for before, after in pairwise(segments):
        assert before.hi < after.lo or (before.hi == after.lo and before.slot != after.slot)


NO = NO_ADAPTER


@pytest.mark.parametrize(
    ("slots", "short", "starts", "long"),
    [
        ([], [], [0], []),
        ([NO], [], [0, 0], []),
        ([NO] * 33, [], [0, 0, 0, 0], []),
        ([2], [(2, 0, 1)], [0, 1], []),
        ([0, 1, 1], [(0, 0, 1), (1, 1, 3)], [0, 2], []),
        ([1] * 16, [(1, 0, 16)], [0, 1], []),
        ([1] * 17, [(1, 0, 16), (1, 16, 17)], [0, 1, 2], []),
        ([NO, *[1] * 16], [(1, 1, 16), (1, 16, 17)], [0, 1, 2], []),
        ([NO] * 16 + [4], [(4, 16, 17)], [0, 0, 1], []),
        ([4] + [NO] * 40, [(4, 0, 1)], [0, 1, 1, 1], []),
        (
            [3] * 64,
            [(3, 0, 16), (3, 16, 32), (3, 32, 48), (3, 48, 64)],
            [0, 1, 2, 3, 4],
            [],
        ),
        ([3] * 65, [], [0] * 6, [(3, 0, 64), (3, 64, 65)]),
        ([0, *[3] * 128], [(0, 0, 1)], [0, *[1] * 9], [(3, 1, 65), (3, 65, 129)]),
        (
            [*[3] * 70, 5, 5],
            [(5, 70, 72)],
            [0, 0, 0, 0, 0, 1],
            [(3, 0, 64), (3, 64, 70)],
        ),
    ],
)
def test_tiles(
    slots: list[int],
    short: list[tuple[int, int, int]],
    starts: list[int],
    long: list[tuple[int, int, int]],
) -> None:
    tiles = tiles_of(segments_of(slots), len(slots))
    assert tiles.short == [Segment(*tile) for tile in short]
    assert tiles.starts == starts
    assert tiles.long == [Segment(*tile) for tile in long]


RUNS = st.lists(st.tuples(st.integers(NO_ADAPTER, 2), st.integers(1, 140)), max_size=8)


@settings(deadline=None)
@given(RUNS)
def test_every_row_with_an_adapter_is_in_one_tile(runs: list[tuple[int, int]]) -> None:
    slots = [slot for slot, count in runs for _ in range(count)]
    segments = segments_of(slots)
    tiles = tiles_of(segments, len(slots))
    rebuilt = [NO_ADAPTER] * len(slots)
    for slot, lo, hi in [*tiles.short, *tiles.long]:
        assert lo < hi
        assert rebuilt[lo:hi] == [NO_ADAPTER] * (hi - lo)
        rebuilt[lo:hi] = [slot] * (hi - lo)
    assert rebuilt == slots
    is_long = {row: hi - lo > LONG_TILE_ROWS for _, lo, hi in segments for row in range(lo, hi)}
    for _, lo, hi in tiles.short:
        assert lo // TILE_ROWS == (hi - 1) // TILE_ROWS
        assert not is_long[lo]
    for _, lo, hi in tiles.long:
        assert hi - lo <= LONG_TILE_ROWS
        assert is_long[lo]
    for group, (first, end) in enumerate(pairwise(tiles.starts)):
        mine = [tile for tile in tiles.short if tile.lo // TILE_ROWS == group]
        assert tiles.short[first:end] == mine
    assert tiles.starts[0] == 0
    assert tiles.starts[-1] == len(tiles.short)


def test_padding_fills_a_list_to_its_capacity() -> None:
    tile = Segment(1, 0, 3)
    assert PADDING.slot == NO_ADAPTER
    assert pad_tiles([], 2) == [PADDING, PADDING]
    assert pad_tiles([tile], 3) == [tile, PADDING, PADDING]
    assert pad_tiles([tile], 1) == [tile]
    with pytest.raises(AssertionError, match="2 tiles in a list of 1"):
        pad_tiles([tile, tile], 1)
