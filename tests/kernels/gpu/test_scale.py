"""The output scale against plain fp32 maths: every popularity, odd shapes, poison all around."""

import pytest
import torch
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.scale import BLOCK, scale_output_
from loraplex_kernels.ops import Projection
from loraplex_kernels.segments import LONG_TILE_ROWS, NO_ADAPTER, TILE_ROWS
from torch import Tensor

from tests.kernels.gpu.banks import Recorder, framed, with_tiles
from tests.kernels.inputs import POPULARITY, PROJECTIONS, Bank, bank_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = BLOCK // TILE_ROWS + 3
SHAPES = {
    "stacked": PROJECTIONS,
    "many_blocks": (Projection(2, 9, WIDE), Projection(0, 9 + WIDE, 17), Projection(1, 300, 576)),
    "not_all_modules": (Projection(2, 0, 40), Projection(0, 40, 40)),
    "single": (Projection(1, 1, 1),),
}


def some(
    shape: str, dtype: torch.dtype, num_rows: int, rng: torch.Generator
) -> tuple[Bank, Tensor]:
    """A bank, and y with columns to spare at its end."""
    bank = bank_of(dtype, rng, k=16, projections=SHAPES[shape])
    num_columns = max(p.column + p.width for p in bank.projections) + 6
    return bank, torch.randn(num_rows, num_columns, generator=rng).to(dtype)


def run(bank: Bank, y: Tensor, slots: list[int], layer: int = 1, spare: int = 1) -> Tensor:
    """y afterwards; the kernel gets a copy, in a frame of NaN."""
    frame, arena = framed(y), bank.arena.clone()
    lora = with_tiles(bank, slots, spare)
    scale_output_(launch_now, frame.inner, lora, layer, bank.projections)
    assert frame.is_intact()
    assert torch.equal(bank.arena, arena)
    return frame.inner.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_popularity(dtype: torch.dtype, rng: torch.Generator) -> None:
    """One product, rounded once: exactly the plain result, for rows that are not scaled too."""
    slots: list[int] = []
    for popularity in POPULARITY.values():
        for num_rows in (1, 7, 20):
            slots += [*popularity(num_rows, rng), NO_ADAPTER]
    bank, y = some("stacked", dtype, len(slots), rng)
    assert torch.equal(run(bank, y, slots), bank.scaled(y, slots, 1).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, rng: torch.Generator) -> None:
    """Short tiles, and long ones from segments at both sides of their length; inf and NaN go on."""
    long = LONG_TILE_ROWS
    slots = [NO_ADAPTER, 0, 1, 2, 3, 4, 5, NO_ADAPTER, *[3] * long, *[1] * (long + 1)]
    bank, y = some(shape, torch.float16, len(slots), rng)
    y[::5, ::3] = torch.inf
    y[1::5, ::3] = torch.nan
    expected = bank.scaled(y, slots, 1).half()
    assert torch.equal(run(bank, y, slots).nan_to_num(7.0), expected.nan_to_num(7.0))


def test_nothing_to_scale(rng: torch.Generator) -> None:
    """Lists of nothing but padding, adapters without a scale, and a layer that has none."""
    bank, y = some("stacked", torch.float16, 20, rng)
    assert torch.equal(run(bank, y, [NO_ADAPTER] * 20, spare=2), y)
    assert torch.equal(run(bank, y, [0] * 10 + [4] * 10), y)
    assert torch.equal(run(bank, y, [1] * 10 + [3] * 10, layer=0), y)


def test_one_launch_serves_whatever_the_tensors_say(rng: torch.Generator) -> None:
    num_rows, nobody = 18, [NO_ADAPTER] * 18
    bank, y = some("stacked", torch.float32, num_rows, rng)
    out, fixed, recorder = y.clone(), with_tiles(bank, nobody, spare=num_rows), Recorder()
    scale_output_(recorder, out, fixed, 1, bank.projections)
    assert fixed.tiles is not None
    for slots in ([3, *nobody[1:]], [0, 1, 2, 3, 4, 5, *[1] * 9, NO_ADAPTER, 3, 0], nobody):
        tiles = with_tiles(bank, slots, spare=num_rows).tiles
        assert tiles is not None
        fixed.tiles.short.copy_(tiles.short[:num_rows])
        out.copy_(y)
        recorder.replay()
        assert torch.equal(out, bank.scaled(y, slots, 1))
    bank.tables.write(3, [])
    assert torch.equal(run(bank, y, [3] * num_rows), y)
