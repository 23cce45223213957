"""Where a curve of tokens a second falls off a cliff as the work grows. Pure.

A step that costs a + b * work gives rates that bend downwards on logarithmic axes, and so does a
step that is bound by memory first and by arithmetic later: no point of such a curve lies under the
straight line between its neighbours. A point that does is a cliff's edge, or a hole.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """A place on a curve."""

    work: float  # of what grows: rows, adapters, tokens of context
    rate: float  # tokens/s


class Dip(NamedTuple):
    """A point beside the least that is no cliff."""

    work: float
    ratio: float  # its rate over that least; under 1 it lies below


def lowest(points: Sequence[Point], is_batch: bool) -> Dip:
    """The point that lies deepest; at least two points, in ascending order of work.

    The least that is no cliff is the highest of:
        the line between the two neighbours, on logarithmic axes
        the point before, where the work is the batch: more rows, no fewer tokens a second
        the point before over the growth of the work, elsewhere: a step's cost grows no faster
        than the work does
    """
    return min(_dips(points, is_batch), key=lambda dip: dip.ratio)


def _dips(points: Sequence[Point], is_batch: bool) -> list[Dip]:
    dips = []
    for before, at in pairwise(points):
        least = before.rate if is_batch else before.rate * before.work / at.work
        dips.append(Dip(at.work, at.rate / least))
    for before, at, after in zip(points, points[1:], points[2:], strict=False):
        dips.append(Dip(at.work, at.rate / _line(before, after, at.work)))
    return dips


def _line(before: Point, after: Point, work: float) -> float:
    """The rate there on the line between two points, on logarithmic axes."""
    part = math.log(work / before.work) / math.log(after.work / before.work)
    return math.exp((1 - part) * math.log(before.rate) + part * math.log(after.rate))
