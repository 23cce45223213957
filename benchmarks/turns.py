"""Who runs which wave when: Loraplex, a peer, the next one, ..., so that a drift reaches all."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from child import BenchmarkError
from figures import Summary, Timeline, num_tokens
from peers.pipe import Peer
from processes import wait_until_idle
from waves import Shape, Wave, Workload

WARM_UP_TOKENS = 4
"""Enough for adapters to become resident and for libraries to choose their kernels."""

SECONDS_TO_COME_TO_REST = 20.0

Results = Mapping[Shape, Mapping[str, Summary]]
"""By shape and system, in the order in which they took turns."""


@dataclass(frozen=True, slots=True)
class System:
    """One of those that take turns."""

    name: str
    peer: Peer
    repeats: int
    mixes: bool = True  # False: asked for the bare base alone
    patience: float = float("inf")  # seconds; a wave that took longer is not repeated


class Turn(NamedTuple):
    """One wave of one system; `repeat` None is the unmeasured warm-up."""

    shape: Shape
    repeat: int | None
    system: System


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out, and what did not."""

    results: Results
    remarks: Sequence[str]


Done = Callable[[Turn], None]


def turns(wanted: Sequence[Shape], systems: Sequence[System]) -> Iterator[Turn]:
    """Batch by batch: a warm-up of each shape, then round after round of all its shapes.

    The shapes of one batch take turns too, so that "of own base" compares neighbours.
    """
    for batch in sorted({shape.batch for shape in wanted}):
        of_batch = [shape for shape in wanted if shape.batch == batch]
        for repeat in (None, *range(max(system.repeats for system in systems))):
            for shape in of_batch:
                for system in systems:
                    can = system.mixes or shape.num_adapters == 0
                    if can and (repeat is None or repeat < system.repeats):
                        yield Turn(shape, repeat, system)


@dataclass(slots=True)
class Measurement:
    """Takes every turn. Mutable: what came of those taken."""

    workload: Workload
    wanted: Sequence[Shape]
    systems: Sequence[System]
    _waves: dict[tuple[Shape, str], list[list[Timeline]]] = field(default_factory=dict)
    _enough: set[tuple[Shape, str]] = field(default_factory=set)  # took too long once
    _gone: set[str] = field(default_factory=set)  # their process has ended
    _remarks: list[str] = field(default_factory=list)

    def run(self, done: Done) -> Measured:
        """`done` is told of each turn. The first system may not fail; others are left out."""
        for turn in turns(self.wanted, self.systems):
            name = turn.system.name
            if name not in self._gone and (turn.shape, name) not in self._enough:
                self._take(turn)
            done(turn)
        asked, seconds = self.workload.max_tokens, self.workload.seconds
        results: dict[Shape, dict[str, Summary]] = {shape: {} for shape in self.wanted}
        for shape, by_system in results.items():
            for system in self.systems:
                if waves := self._waves.get((shape, system.name)):
                    by_system[system.name] = Summary.of(waves, asked, seconds)
        return Measured(results, self._remarks)

    def _take(self, turn: Turn) -> None:
        shape, repeat, system = turn
        wave = self.workload.wave(shape, -1 if repeat is None else repeat)
        if repeat is None:
            wave = replace(wave, max_tokens=WARM_UP_TOKENS)
        try:
            timelines = answers(system, wave)
        except BenchmarkError as error:
            if system is self.systems[0]:
                raise
            self._gone.add(system.name)
            self._remarks.append(f"{system.name} is left out from {shape} on: {error}")
            return
        if not any(timelines):
            self._enough.add((shape, system.name))
            self._remarks.append(
                f"{system.name}, {shape}: not one token after {wave.seconds:g} s, left out"
            )
        elif repeat is not None:
            self._waves.setdefault((shape, system.name), []).append(timelines)
            last = max(timeline[-1].seconds for timeline in timelines if timeline)
            if last > system.patience:
                self._enough.add((shape, system.name))


def answers(system: System, wave: Wave) -> list[Timeline]:
    """Figures are worth something only where everyone did the same work.

    Fewer tokens than asked for are right only where the wave's time was up. Returns when the
    system has come to rest.
    """
    start = time.perf_counter()
    timelines = [reply.timeline for reply in system.peer.run(wave)]
    was_stopped = time.perf_counter() - start >= wave.seconds
    counts = [num_tokens(timeline) for timeline in timelines]
    asked = [wave.max_tokens] * len(wave.prompts)
    if counts != asked and not was_stopped:
        raise BenchmarkError(
            f"{system.name} generated {counts} tokens for {len(wave.prompts)} requests, "
            f"not {wave.max_tokens} for each"
        )
    if system.peer.pid is not None:
        wait_until_idle(system.peer.pid, SECONDS_TO_COME_TO_REST)
    return timelines
