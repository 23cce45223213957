"""How long prompts and answers are: always the same, anything between two bounds, log-normal."""

import math
import random
from dataclasses import dataclass
from typing import Protocol


class Lengths(Protocol):
    """A distribution of token counts, each at least 1."""

    def draw(self, rng: random.Random) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """N"""

    tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class Uniform:
    """LO:HI, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """lognormal:MEAN:SIGMA:LO:HI. What falls outside the bounds is moved to them.

    `mean` is that of the lengths before they are bounded, `sigma` that of their logarithms.
    """

    mean: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        drawn = rng.lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
        return min(max(round(drawn), self.low), self.high)

    def __str__(self) -> str:
        return f"lognormal:{self.mean:g}:{self.sigma:g}:{self.low}:{self.high}"


MOST = 1_000_000
"""The upper bound where none is given; more than any context holds."""


def parse_lengths(text: str) -> Lengths:
    """`64`, `16:256`, `lognormal:128:0.8[:4[:1024]]`; ValueError in words for whoever typed it."""
    name, _, rest = text.partition(":")
    if name == "lognormal":
        return _log_normal(text, rest.split(":"))
    bounds = text.split(":")
    if len(bounds) > 2 or not all(_is_count(bound) for bound in bounds):
        raise ValueError(f"{text!r} is not N, LO:HI or lognormal:MEAN:SIGMA[:LO[:HI]]")
    if len(bounds) == 1:
        return Fixed(int(text))
    low, high = map(int, bounds)
    _check_order(text, low, high)
    return Uniform(low, high)


def _log_normal(text: str, parts: list[str]) -> LogNormal:
    try:
        mean, sigma = map(float, parts[:2])
    except ValueError:
        raise ValueError(f"{text!r} is not lognormal:MEAN:SIGMA[:LO[:HI]]") from None
    if not (math.isfinite(mean) and mean >= 1 and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"{text!r}: the mean is at least 1 token, sigma at least 0")
    bounds = parts[2:]
    if len(bounds) > 2 or not all(_is_count(bound) for bound in bounds):
        raise ValueError(f"{text!r}: bounds are one or two positive whole numbers")
    low, high = [*map(int, bounds), *(1, MOST)[len(bounds) :]]
    _check_order(text, low, high)
    return LogNormal(mean, sigma, low, high)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def _check_order(text: str, low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"{text!r}: {low} is more than {high}")
