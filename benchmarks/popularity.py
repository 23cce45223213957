"""Which adapter each request, or each row of a batch, asks for."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ZIPF_EXPONENT = 1.5
SKEWED_SHARE = 0.9


def zipf_weights(number: int, exponent: float) -> list[float]:
    """The n-th adapter is asked for n^exponent times less often than the first."""
    return [1 / (rank + 1) ** exponent for rank in range(number)]


def draws(number: int, exponent: float, count: int, seed: int) -> list[int]:
    """So many adapters by number, Zipf distributed; exponent 0 is uniform."""
    rng = random.Random(f"draws {seed} {number} {exponent}")
    return rng.choices(range(number), zipf_weights(number, exponent), k=count)


def _shares(number: int, parameters: Sequence[float]) -> Sequence[float]:
    if len(parameters) != number:
        raise ValueError(f"{len(parameters)} weights for {number} adapters")
    return parameters


def _power_law_weights(number: int, exponent: float) -> list[float]:
    """Of floor(number * U^(1/exponent)), U uniform: numpy's `power`, as S-LoRA's traces draw it."""
    edges = [(rank / number) ** exponent for rank in range(number + 1)]
    return [after - before for before, after in itertools.pairwise(edges)]


_WEIGHTS: Mapping[str, Callable[[int, Sequence[float]], Sequence[float]]] = {
    "uniform": lambda number, _: [1.0] * number,
    "zipf": lambda number, parameters: zipf_weights(number, *parameters),
    "power-law": lambda number, parameters: _power_law_weights(number, *parameters),
    "weights": _shares,
}
_IN_ORDER = ("round-robin", "distinct", "identical")
_DEFAULTS: Mapping[str, tuple[float, ...]] = {"zipf": (1.0,), "power-law": (0.3,)}


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often a stream of requests asks for each of its adapters.

    uniform       every adapter with the same chance
    round-robin   the adapters in turn
    zipf:E        the n-th adapter n^E times rarer than the first
    power-law:A   S-LoRA's traces (Sheng et al. 2023): the smaller A, the more on the first; 1 is
                  uniform
    identical     the first adapter only
    distinct      every request its own; as many adapters as requests
    weights:W,... these shares, one an adapter: 10,1,1 floods the first
    """

    kind: str
    parameters: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """ValueError, in words for whoever typed it, where it names no popularity."""
        kind, _, rest = text.partition(":")
        if kind not in (*_WEIGHTS, *_IN_ORDER):
            raise ValueError(f"{text!r} is none of {', '.join((*_WEIGHTS, *_IN_ORDER))}")
        try:
            given = tuple(float(part) for part in rest.split(",")) if rest else ()
        except ValueError:
            raise ValueError(f"{text!r}: {rest!r} is no number") from None
        parameters = given or _DEFAULTS.get(kind, ())
        wanted = 1 if kind in _DEFAULTS else 0
        if kind == "weights" and not given:
            raise ValueError("weights needs a number for each adapter: weights:10,1,1")
        if kind != "weights" and len(parameters) != wanted:
            raise ValueError(f"{text!r}: {kind} takes {'one number' if wanted else 'no number'}")
        if not all(math.isfinite(value) and value > 0 for value in parameters):
            raise ValueError(f"{text!r}: {rest} is not positive")
        return cls(kind, parameters)

    def __str__(self) -> str:
        if not self.parameters:
            return self.kind
        return f"{self.kind}:{','.join(f'{value:g}' for value in self.parameters)}"

    def draw(self, number: int, count: int, rng: random.Random) -> list[int]:
        """For each of `count` requests an adapter of 0..number-1; ValueError where that is none."""
        if self.kind == "distinct" and number < count:
            raise ValueError(f"distinct adapters for {count} requests, and there are {number}")
        if self.kind == "identical":
            return [0] * count
        if self.kind in _IN_ORDER:
            return [request % number for request in range(count)]
        return rng.choices(range(number), _WEIGHTS[self.kind](number, self.parameters), k=count)


def _distinct(num_rows: int, rng: random.Random) -> list[int]:
    """Every row its own."""
    return list(range(num_rows))


def _uniform(num_rows: int, rng: random.Random) -> list[int]:
    """About as many adapters as each has rows."""
    return [rng.randrange(math.ceil(math.sqrt(num_rows))) for _ in range(num_rows)]


def _zipf(num_rows: int, rng: random.Random) -> list[int]:
    """The n-th adapter n^1.5 times rarer than the first."""
    return rng.choices(range(num_rows), zipf_weights(num_rows, ZIPF_EXPONENT), k=num_rows)


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
    """Each row's adapter in the five ways of Punica (Chen et al. 2023); the seed decides.

    Ascending, numbered from 0 without gaps.
    """
    drawn = sorted(_DRAWS[popularity](num_rows, random.Random(f"{seed} {num_rows}")))
    numbers = {adapter: number for number, adapter in enumerate(dict.fromkeys(drawn))}
    return [numbers[adapter] for adapter in drawn]
