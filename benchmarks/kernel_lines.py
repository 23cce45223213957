"""What benchmarks/kernel_speed.py asks of each op, the bytes that it must move, and its times."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from loraplex_kernels.cases import Case, CaseMaker, LinearShape, ModelShapes
from loraplex_kernels.check import Timer
from loraplex_kernels.ops import Ops
from loraplex_kernels.segments import LONG_TILE_ROWS
from popularity import adapters_of

log = logging.getLogger(__name__)

CONTEXT = 1024
"""Keys that each query of the attention lines sees."""

FUSED = "fused"
PATHS = (FUSED, "bitsandbytes", "dequantized")
"""Our ways of nf4_linear, as in loraplex_kernels.gpu.paths; LoRA is our kernels' in all."""

OURS, TORCH = "triton", "torch"

BANDWIDTH = {"H100": 3.35e12, "A100": 2.04e12, "L4": 0.3e12}
"""Bytes/s of device memory as NVIDIA states them: H100 SXM, A100 80GB SXM."""


@dataclass(frozen=True, slots=True)
class Line:
    """One op at one size. `rank` and `popularity` are None where it does not depend on them."""

    models: str  # that share these shapes
    kernel: str  # of gpu.ops.KERNELS
    what: str  # which linear, or with how many keys
    rows: int
    rank: int | None
    popularity: str | None
    num_adapters: int
    bytes_moved: int  # each byte that it must touch, once
    seconds: Mapping[str, float]  # by way; empty where there is no GPU

    @property
    def best(self) -> float | None:
        """Of the ways that are ours."""
        return min((s for way, s in self.seconds.items() if way != TORCH), default=None)

    @property
    def times_torch(self) -> float | None:
        """How often the best of ours fits into torch's time."""
        torch_seconds = self.seconds.get(TORCH)
        return torch_seconds / self.best if torch_seconds and self.best else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    kernels: Sequence[str]
    rows: Sequence[int]
    ranks: Sequence[int]
    popularities: Sequence[str]


def lines(
    models: Sequence[ModelShapes], wanted: Wanted, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Line, Case]]:
    """Everything wanted, not timed yet. On a device without memory nothing is filled."""
    for names, shapes in _same_shapes(models).items():
        make = partial(CaseMaker, shapes, device, dtype, fill=device.type != "meta")
        for rows in wanted.rows:
            for kernel, what, case in _plain(make(max_rank=16), rows):
                if kernel in wanted.kernels:
                    yield _line(names, case, what), case
            for rank in (None, *wanted.ranks):
                yield from _with_adapters(names, make(max_rank=rank or 16), wanted, rows, rank)


def _plain(make: CaseMaker, rows: int) -> Iterator[tuple[str, str, Case]]:
    yield "add_rms_norm", "", make.add_rms_norm(rows)
    yield "rotary_and_cache", "", make.rotary_and_cache(rows)
    yield "silu_mul", "", make.silu_mul(rows)
    attention = make.attention(f"decode at {CONTEXT}", [(CONTEXT, 1)] * rows)
    yield "attention", f"{CONTEXT} keys", attention


def _with_adapters(
    names: str, make: CaseMaker, wanted: Wanted, rows: int, rank: int | None
) -> Iterator[tuple[Line, Case]]:
    """Popularities that spread these rows alike, as all do with one row, are asked once.

    Without a rank it is the op that reads no weights.
    """
    seen: list[list[int]] = []
    for popularity in wanted.popularities:
        slots = adapters_of(popularity, rows)
        if slots in seen:
            continue
        seen.append(slots)
        for linear in make.shapes.linears:
            for kernel, case in _of_linear(make, linear, slots, rank):
                if kernel in wanted.kernels:
                    line = _line(names, case, linear.name)
                    adapters = len({*slots})
                    yield (
                        replace(line, rank=rank, popularity=popularity, num_adapters=adapters),
                        case,
                    )


def _of_linear(
    make: CaseMaker, linear: LinearShape, slots: Sequence[int], rank: int | None
) -> Iterator[tuple[str, Case]]:
    if rank is None:
        scaled = [[True] * len(linear.projections)] * (max(slots) + 1)
        yield "scale_output", make.scale_output(linear, scaled, slots)
        return
    ranks = [[rank] * len(linear.projections)] * (max(slots) + 1)
    yield "lora", make.lora(linear, ranks, slots)
    yield "nf4_linear", make.nf4_linear(linear, ranks, slots)


def _line(names: str, case: Case, what: str) -> Line:
    return Line(names, case.kernel, what, case.num_rows, None, None, 0, case.bytes_moved, {})


def _same_shapes(models: Sequence[ModelShapes]) -> dict[str, ModelShapes]:
    """By the names of all that differ in nothing else: `Llama-3-8B, Mistral-7B`."""
    groups: dict[ModelShapes, list[str]] = {}
    for shapes in models:
        groups.setdefault(replace(shapes, name="", num_layers=1), []).append(shapes.name)
    return {", ".join(names): shapes for shapes, names in groups.items()}


def timed(line: Line, case: Case, ways: Mapping[str, Ops], timer: Timer) -> Line:
    """The line with the time of each way that can take it, all on the same tensors.

    What a compiler or a driver refuses is left out, with a warning: the other ways still count.
    """
    prepared = case.prepare()
    seconds = {}
    for way in ways_of(line):
        prepared.poison()
        try:
            seconds[way] = timer(partial(prepared.call, ways[way]))
        except Exception as error:
            log.warning("%s, %s, %d rows: %s", way, case.kernel, line.rows, error)
    return replace(line, seconds=seconds)


def ways_of(line: Line) -> tuple[str, ...]:
    if line.kernel != "nf4_linear":
        return (OURS, TORCH)
    ours = tuple(way for way in PATHS if way != FUSED or line.rows <= LONG_TILE_ROWS)
    return (*ours, TORCH)
