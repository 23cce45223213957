"""What is asked of a server: which requests, when, for which adapters, how long.

The same seed gives the same workload. Arrivals, adapters, lengths and contents are drawn each from
a stream of its own, so that a change of one option leaves the others' draws as they are.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from arrivals import arrival_times
from lengths import Lengths
from popularity import Popularity
from trace_file import TraceLine


class Request(NamedTuple):
    """One completion, of exactly `max_tokens` tokens."""

    token_ids: tuple[int, ...]  # the prompt
    adapter: str | None  # None: the bare base
    max_tokens: int
    at: float = 0.0  # seconds from the start at which it is due; a closed loop asks by the order
    priority: int | None = None


class PrefixScope(StrEnum):
    """Who shares a prefix."""

    ADAPTER = "adapter"  # all requests of one adapter; another adapter has another
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens that prompts begin with, before their own: what a prefix cache can give."""

    num_tokens: int = 0
    scope: PrefixScope = PrefixScope.ADAPTER


@dataclass(frozen=True, slots=True)
class Traffic:
    """Makes up requests."""

    num_requests: int
    adapters: Sequence[str]  # by name; none: the bare base
    popularity: Popularity
    prompt: Lengths  # without the shared prefix
    output: Lengths
    prefix: Prefix
    rate: float  # requests a second; infinite: all are due at once
    burstiness: float
    vocab_size: int
    seed: int

    def requests(self, part: str) -> list[Request]:
        """Parts ("warm-up", "run 1", ...) differ only in what the prompts say.

        No prompt is another's beyond the shared prefix, and no part shares one with another part:
        a prefix cache gives in each what it gives in the first.
        """
        count = self.num_requests
        due = arrival_times(count, self.rate, self.burstiness, self._rng("arrivals"))
        prompt_lengths, output_lengths = self._rng("prompt lengths"), self._rng("output lengths")
        prompts = Prompts(self.vocab_size, self.prefix, f"{self.seed} {part}")
        return [
            Request(
                at=at,
                adapter=adapter,
                token_ids=prompts.prompt(adapter, self.prompt.draw(prompt_lengths)),
                max_tokens=self.output.draw(output_lengths),
            )
            for at, adapter in zip(due, self._adapters(), strict=True)
        ]

    def _adapters(self) -> list[str | None]:
        if not self.adapters:
            return [None] * self.num_requests
        rng = self._rng("adapters")
        drawn = self.popularity.draw(len(self.adapters), self.num_requests, rng)
        return [self.adapters[number] for number in drawn]

    def _rng(self, stream: str) -> random.Random:
        return random.Random(f"{stream} {self.seed}")


class Prompts:
    """Random prompts. Mutable: `_rng`, and `_prefixes`, made when first asked for."""

    def __init__(self, vocab_size: int, prefix: Prefix, seed: str) -> None:
        self._tokens = range(vocab_size)
        self._prefix = prefix
        self._seed = seed
        self._rng = random.Random(f"prompts {seed}")
        self._prefixes: dict[str | None, tuple[int, ...]] = {}

    def prompt(self, adapter: str | None, num_tokens: int) -> tuple[int, ...]:
        """The prefix, and so many tokens of its own."""
        own = self._rng.choices(self._tokens, k=num_tokens)
        return (*self._shared(adapter), *own)

    def _shared(self, adapter: str | None) -> tuple[int, ...]:
        whose = adapter if self._prefix.scope is PrefixScope.ADAPTER else None
        if whose not in self._prefixes:
            rng = random.Random(f"prefix {self._seed} {whose}")
            self._prefixes[whose] = tuple(rng.choices(self._tokens, k=self._prefix.num_tokens))
        return self._prefixes[whose]


def replayed(
    lines: Sequence[TraceLine], speed: float, vocab_size: int, seed: int, part: str
) -> list[Request]:
    """A trace's requests, `speed` times as fast; prompts of which it says only the length are new
    in each part.
    """
    prompts = Prompts(vocab_size, Prefix(), f"{seed} {part}")
    return [
        Request(
            at=(line.timestamp - lines[0].timestamp) / speed,
            adapter=line.adapter,
            token_ids=line.token_ids or prompts.prompt(None, line.prompt_tokens or 1),
            max_tokens=line.max_tokens,
            priority=line.priority,
        )
        for line in lines
    ]


def as_trace(requests: Sequence[Request]) -> list[TraceLine]:
    """For `write_trace`, prompts and all."""
    return [
        TraceLine(
            timestamp=request.at,
            adapter=request.adapter,
            max_tokens=request.max_tokens,
            token_ids=request.token_ids,
            priority=request.priority,
        )
        for request in requests
    ]
