"""Who runs which wave when: Loraplex, peer, Loraplex, ..., so that a drift reaches all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from child import BenchmarkError
from figures import Summary, Timeline, num_tokens
from peers.pipe import Peer
from report import Results
from workload import Shape, Wave, Workload

WARM_UP_TOKENS = 4
"""Enough for adapters to become resident and for libraries to choose their kernels."""


@dataclass(frozen=True, slots=True)
class System:
    """One of those that take turns."""

    name: str
    peer: Peer
    repeats: int


class Turn(NamedTuple):
    """One wave of one system; `repeat` None is the unmeasured warm-up."""

    shape: Shape
    repeat: int | None
    system: str


Done = Callable[[Turn], None]


def turns(wanted: Sequence[Shape], repeats: Mapping[str, int]) -> Iterator[Turn]:
    """Batch by batch: a warm-up of each shape, then round after round of all its shapes.

    The shapes of one batch take turns too, so that "of own base" compares neighbours.
    """
    for batch in sorted({shape.batch for shape in wanted}):
        of_batch = [shape for shape in wanted if shape.batch == batch]
        for repeat in (None, *range(max(repeats.values()))):
            for shape in of_batch:
                for system, most in repeats.items():
                    if repeat is None or repeat < most:
                        yield Turn(shape, repeat, system)


def measure(
    systems: Sequence[System], workload: Workload, wanted: Sequence[Shape], done: Done
) -> Results:
    """Takes every turn; `done` is told of each."""
    by_name = {system.name: system for system in systems}
    waves: dict[Shape, dict[str, list[list[Timeline]]]] = {
        shape: {name: [] for name in by_name} for shape in wanted
    }
    for turn in turns(wanted, {system.name: system.repeats for system in systems}):
        wave = workload.wave(turn.shape, -1 if turn.repeat is None else turn.repeat)
        if turn.repeat is None:
            wave = replace(wave, max_tokens=WARM_UP_TOKENS)
        timelines = _run(by_name[turn.system], wave)
        if turn.repeat is not None:
            waves[turn.shape][turn.system].append(timelines)
        done(turn)
    return {
        shape: {name: Summary.of(repeats) for name, repeats in by_system.items()}
        for shape, by_system in waves.items()
    }


def _run(system: System, wave: Wave) -> list[Timeline]:
    """Figures are worth something only where everyone did the same work."""
    timelines = system.peer.run(wave)
    counts = [num_tokens(timeline) for timeline in timelines]
    if counts != [wave.max_tokens] * len(wave.prompts):
        raise BenchmarkError(
            f"{system.name} generated {counts} tokens for {len(wave.prompts)} requests, "
            f"not {wave.max_tokens} for each"
        )
    return timelines
