"""How a step's budget for prompts is divided among clients. Pure."""

from collections.abc import Sequence as Seq

QUANTUM = 16
"""Tokens: as much of a prompt is computed at least, where the budget has it."""

SHORT = 64
"""Tokens: who needs no more gets all of it at once, for in pieces it would take longer."""


def split(budget: int, needs: Seq[int], num_first: int | None = None) -> list[int]:
    """Tokens for each client, of which the first `num_first` were served less than the others.

    The first ones come before the others. Where the budget is not enough for them, everybody gets a
    quantum before that, or all of what is short, so that nobody with little to do waits for one
    with much. Otherwise max-min fair, in whole quanta as far as needs are. None: all are first.
    """
    grants = [0] * len(needs)
    num_first = len(needs) if num_first is None else num_first
    left = budget
    if sum(needs[:num_first]) > budget:
        for place, need in enumerate(needs):
            left = _give(need if need <= SHORT else QUANTUM, [place], needs, grants, left)
    for tier in (range(num_first), range(num_first, len(needs))):
        for index, place in enumerate(sorted(tier, key=needs.__getitem__)):
            share = left // (len(tier) - index) // QUANTUM * QUANTUM
            left = _give(share, [place], needs, grants, left)
        left = _give(left, tier, needs, grants, left)
    return grants


def _give(most: int, places: Seq[int], needs: Seq[int], grants: list[int], left: int) -> int:
    """So much more for each of them, while there is something; what is left then."""
    for place in places:
        more = min(most, needs[place] - grants[place], left)
        grants[place] += more
        left -= more
    return left
