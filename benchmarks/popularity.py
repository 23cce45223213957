"""Which adapter each of a batch's rows asks for, in the five ways of Punica (Chen et al. 2023)."""

import math
import random
from collections.abc import Callable, Mapping

ZIPF_EXPONENT = 1.5
SKEWED_SHARE = 0.9


def _distinct(num_rows: int, rng: random.Random) -> list[int]:
    """Every row its own."""
    return list(range(num_rows))


def _uniform(num_rows: int, rng: random.Random) -> list[int]:
    """About as many adapters as each has rows."""
    return [rng.randrange(math.ceil(math.sqrt(num_rows))) for _ in range(num_rows)]


def _zipf(num_rows: int, rng: random.Random) -> list[int]:
    """The n-th adapter n^1.5 times rarer than the first."""
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(num_rows)]
    return rng.choices(range(num_rows), weights, k=num_rows)


def _identical(num_rows: int, rng: random.Random) -> list[int]:
    """One adapter."""
    return [0] * num_rows


def _skewed(num_rows: int, rng: random.Random) -> list[int]:
    """One adapter has nine rows of ten; every other row its own."""
    popular = math.ceil(num_rows * SKEWED_SHARE)
    return [0] * popular + list(range(1, num_rows - popular + 1))


_DRAWS: Mapping[str, Callable[[int, random.Random], list[int]]] = {
    "distinct": _distinct,
    "uniform": _uniform,
    "zipf": _zipf,
    "identical": _identical,
    "skewed": _skewed,
}
POPULARITIES = tuple(_DRAWS)


def adapters_of(popularity: str, num_rows: int, seed: int = 1) -> list[int]:
    """Each row's adapter, ascending, numbered from 0 without gaps; the seed decides."""
    drawn = sorted(_DRAWS[popularity](num_rows, random.Random(f"{seed} {num_rows}")))
    numbers = {adapter: number for number, adapter in enumerate(dict.fromkeys(drawn))}
    return [numbers[adapter] for adapter in drawn]
