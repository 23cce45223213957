"""Segments are the runs of equal slots, and rows without an adapter are in none."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_kernels.segments import NO_ADAPTER, Segment, segments_of


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
