"""What every system is asked, and what it answers: requests that are sent at one moment."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from figures import Timeline


class Shape(NamedTuple):
    """One line of the table: so many requests at once, for so many distinct adapters."""

    batch: int
    num_adapters: int  # 0: the bare base

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.num_adapters} adapters"


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that are sent at one moment. `prompts` and `adapters` are parallel."""

    prompts: tuple[tuple[int, ...], ...]  # token ids
    adapters: tuple[str | None, ...]  # None: the bare base
    max_tokens: int  # each request generates exactly so many
    seconds: float  # unless so much time has gone by: what is there by then is the answer

    @property
    def num_tokens(self) -> int:
        return len(self.prompts) * self.max_tokens


class Reply(NamedTuple):
    """What one request of a wave got."""

    timeline: Timeline
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """Makes waves of random prompts: the same seed gives the same waves."""

    adapters: tuple[str, ...]  # by name
    vocab_size: int
    prompt_tokens: int
    max_tokens: int
    seconds: float
    seed: int

    def wave(self, shape: Shape, repeat: int) -> Wave:
        """No two requests share a prompt, so that no prefix cache has anything to give."""
        rng = random.Random(f"{self.seed} {shape.batch} {shape.num_adapters} {repeat}")
        prompts = tuple(
            tuple(rng.randrange(self.vocab_size) for _ in range(self.prompt_tokens))
            for _ in range(shape.batch)
        )
        return Wave(prompts, round_robin(shape, self.adapters), self.max_tokens, self.seconds)


def shapes(batches: Iterable[int], adapters: Iterable[int]) -> list[Shape]:
    """The combinations that make sense: no more adapters than requests."""
    counts = sorted(set(adapters))
    return [Shape(batch, n) for batch in sorted(set(batches)) for n in counts if n <= batch]


def round_robin(shape: Shape, adapters: Sequence[str]) -> tuple[str | None, ...]:
    """The first `num_adapters` adapters in turn.

    As many adapters as requests: all distinct. One adapter: all identical. None: the bare base.
    """
    if shape.num_adapters == 0:
        return (None,) * shape.batch
    chosen = adapters[: shape.num_adapters]
    assert len(chosen) == shape.num_adapters
    return tuple(chosen[i % len(chosen)] for i in range(shape.batch))
