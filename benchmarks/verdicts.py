"""What the figures beside the peers' have to show: ratios, each with its limit."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from command import Check
from figures import Summary
from peers.catalog import OURS, TITLES
from turns import Results
from waves import Shape

OF_OWN_BASE = {1: 0.92, 8: 0.85, 16: 0.78, 32: 0.65}
"""At batch 32, by adapters in the batch: the least part of the bare base's rate."""

Figure = Callable[[Summary], float | None]


@dataclass(frozen=True, slots=True)
class Best:
    """The peer that a figure of ours is held against."""

    name: str
    value: float


def of_own_base(results: Results, shape: Shape, system: str) -> float | None:
    """Decode rate as a part of the same system's without adapters, at the same batch."""
    base = results.get(Shape(shape.batch, 0), {}).get(system)
    if base is None or shape.num_adapters == 0 or not base.decode:
        return None
    rate = results[shape][system].decode
    return None if rate is None else rate / base.decode


def checks(results: Results, ignoring: Collection[str] = ()) -> Iterator[Check]:
    """Those whose shapes and peers were measured; `ignoring` names peers that ignore adapters."""
    for batch in (32, 8):
        yield from _beside_bases(results, batch)
    yield from _beside_mixed(results, Shape(32, 8), ignoring)
    yield from _alone(results)
    for adapters, least in OF_OWN_BASE.items():
        yield from _part_of_own_base(results, Shape(32, adapters), least)
    yield from _first_token(results, Shape(32, 8))


def best(
    results: Results,
    shape: Shape,
    figure: Figure,
    pick: Callable[..., Best],
    names: Collection[str],
) -> Best | None:
    """Of these peers the one with the largest or the smallest figure, as `pick` says."""
    found = [
        Best(name, value)
        for name, summary in results.get(shape, {}).items()
        if name in names and (value := figure(summary)) is not None
    ]
    return pick(found, key=lambda each: each.value) if found else None


def _peers(but: Collection[str] = ()) -> list[str]:
    return [name for name in TITLES if name != OURS and name not in but]


def _decode(summary: Summary) -> float | None:
    return summary.decode


def _first(summary: Summary) -> float | None:
    return summary.first_token_median


def _ours(results: Results, shape: Shape) -> float | None:
    summary = results.get(shape, {}).get(OURS)
    return None if summary is None else summary.decode


def _beside_bases(results: Results, batch: int) -> Iterator[Check]:
    mixed = _ours(results, Shape(batch, 8))
    base = best(results, Shape(batch, 0), _decode, max, _peers())
    if mixed is not None and base is not None:
        what = f"batch {batch}, 8 adapters mixed, over the best peer's base alone"
        yield Check(f"{what} ({TITLES[base.name]})", mixed / base.value, 1.0, at_most=False)


def _beside_mixed(results: Results, shape: Shape, ignoring: Collection[str]) -> Iterator[Check]:
    mixed = _ours(results, shape)
    peer = best(results, shape, _decode, max, _peers(but=ignoring))
    if mixed is not None and peer is not None:
        what = f"{shape} mixed, over the best mixed of any peer ({TITLES[peer.name]})"
        yield Check(what, mixed / peer.value, 5.0, at_most=False)


def _alone(results: Results) -> Iterator[Check]:
    alone, single = Shape(1, 0), Shape(1, 1)
    base = _ours(results, alone)
    for names, limit in ((["llama.cpp"], 0.6), (_peers(but=["llama.cpp"]), 2.0)):
        peer = best(results, alone, _decode, max, names)
        if base is not None and peer is not None:
            what = f"batch 1, base, over {TITLES[peer.name]}'s"
            yield Check(what, base / peer.value, limit, at_most=False)
    yield from _part_of_own_base(results, single, 0.85)


def _part_of_own_base(results: Results, shape: Shape, least: float) -> Iterator[Check]:
    if OURS in results.get(shape, {}):
        part = of_own_base(results, shape, OURS)
        if part is not None:
            yield Check(f"{shape}, over our own base", part, least, at_most=False)


def _first_token(results: Results, shape: Shape) -> Iterator[Check]:
    summary = results.get(shape, {}).get(OURS)
    peer = best(results, Shape(shape.batch, 0), _first, min, _peers())
    if summary is not None and peer is not None:
        what = f"TTFT median, {shape}, over the best peer's base alone ({TITLES[peer.name]})"
        yield Check(what, summary.first_token_median / peer.value, 1.0)
