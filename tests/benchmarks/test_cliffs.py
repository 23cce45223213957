"""Which curves have a cliff."""

import pytest
from cliffs import Point, lowest

WORK = (1, 2, 4, 8, 16, 32, 64)


def curve(*rates: float) -> list[Point]:
    return [Point(work, rate) for work, rate in zip(WORK, rates, strict=False)]


@pytest.mark.parametrize(
    ("points", "is_batch"),
    [
        pytest.param(curve(*(work / (9 + work) for work in WORK)), True, id="a step of a + b rows"),
        pytest.param(curve(*(min(work, 20) for work in WORK)), True, id="flat from a knee on"),
        pytest.param(curve(*(1 / (20 + work) for work in WORK)), False, id="a + b adapters"),
        pytest.param(curve(*(1 / work for work in WORK)), False, id="in proportion to the work"),
    ],
)
def test_no_cliff(points: list[Point], is_batch: bool) -> None:
    assert lowest(points, is_batch).ratio > 0.999


@pytest.mark.parametrize(
    ("points", "is_batch", "at", "ratio"),
    [
        pytest.param(curve(10, 20, 40, 30, 60, 99), True, 8, 0.61, id="a hole"),
        pytest.param(curve(10, 20, 40, 80, 64), True, 16, 0.8, id="more rows, fewer tokens"),
        pytest.param(curve(100, 98, 97, 50, 49, 48), False, 8, 0.725, id="a step down"),
        pytest.param(curve(100, 98, 97, 30), False, 8, 0.619, id="the last one"),
    ],
)
def test_cliffs(points: list[Point], is_batch: bool, at: int, ratio: float) -> None:
    dip = lowest(points, is_batch)

    assert dip.work == at
    assert dip.ratio == pytest.approx(ratio, abs=0.005)
