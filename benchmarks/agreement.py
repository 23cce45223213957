"""Whether each system generates what its adapters say: its tokens beside PEFT's.

Greedy tokens of weights in bfloat16, NF4 and Q4_1 part company sooner or later, and so do those of
one precision where two logits lie close. So a count of equal leading tokens is no verdict. But a
system that says the same with adapters as without has ignored them, and its figures with adapters
are worth nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import median

from turns import System
from waves import Shape, Wave, Workload

TOKENS = 16
ROWS = 8
SECONDS = 120.0

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """One system's greedy tokens for the same prompts; one row a prompt."""

    base: Sequence[Tokens]
    mixed: Sequence[Tokens] | None  # a different adapter in every row; None: it was not asked

    @property
    def changed(self) -> int | None:
        """Rows whose tokens an adapter changes."""
        if self.mixed is None:
            return None
        return sum(mixed != base for mixed, base in zip(self.mixed, self.base, strict=True))


@dataclass(frozen=True, slots=True)
class Leading:
    """Leading tokens that are equal, of TOKENS; medians over rows."""

    base: float
    mixed: float | None  # None: one of the two was not asked


@dataclass(frozen=True, slots=True)
class Agreement:
    """One system beside each reference."""

    leading: Mapping[str, Leading]  # by the reference's name
    changed: int | None

    @property
    def ignores_adapters(self) -> bool:
        return self.changed == 0


def ask(system: System, workload: Workload) -> Said:
    """Two short waves: the bare base, and the adapters where the system takes any."""
    rows = min(ROWS, len(workload.adapters))
    mixed = workload.wave(Shape(ROWS, rows), repeat=-2)
    mixed = replace(mixed, max_tokens=TOKENS, seconds=SECONDS)
    base = replace(mixed, adapters=(None,) * len(mixed.prompts))
    said = _tokens(system, base)
    return Said(said, _tokens(system, mixed) if system.mixes and rows else None)


def agreements(said: Mapping[str, Said], references: Sequence[str]) -> dict[str, Agreement]:
    """Of every system with the references of those names."""
    return {
        name: Agreement({ref: leading(each, said[ref]) for ref in references}, each.changed)
        for name, each in said.items()
    }


def leading(one: Said, other: Said) -> Leading:
    mixed = None
    if one.mixed is not None and other.mixed is not None:
        mixed = _leading(one.mixed, other.mixed)
    return Leading(_leading(one.base, other.base), mixed)


def _tokens(system: System, wave: Wave) -> list[Tokens]:
    return [reply.tokens for reply in system.peer.run(wave)]


def _leading(one: Sequence[Tokens], other: Sequence[Tokens]) -> float:
    return median(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in zip(one, other, strict=True)
    )
