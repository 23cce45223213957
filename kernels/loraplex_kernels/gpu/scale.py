"""Segmented output scale: `y[t, p] *= c` for every tile and projection whose adapter has one.

A launch for each list of tiles, after the linear; no program reads what another writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch
from loraplex_kernels.gpu.lora import columns_of, weights_at
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.segments import LONG_TILE_ROWS, TILE_ROWS

BLOCK = 4096  # elements of y a program: whole 128-bit accesses with four warps, of 64 threads too


@triton.jit(do_not_specialize=["slot_entries", "first_entry"])
def _scale_output(
    y,  # [num_rows, N]
    arena,  # fp32
    output_scale,  # int64 [slots, slot_entries]
    tiles,  # int32 [capacity, 3]
    slot_entries,  # layers * modules, of the tables
    first_entry,  # of this layer
    y_stride,
    MODULES: tl.constexpr,  # of the projections
    COLUMNS: tl.constexpr,  # where they start in y
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Up to BLOCK_N columns of one projection, for one tile.

    Grid (tiles, sum over projections of ceil(width / BLOCK_N)).
    """
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile)
    if slot < 0:
        return
    _, module, column, width, block = columns_of(
        tl.program_id(1), MODULES, COLUMNS, WIDTHS, BLOCK_N
    )
    offset = tl.load(output_scale + slot * slot_entries + first_entry + module)
    if offset < 0:
        return
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < width
    factor = tl.load(weights_at(arena, offset) + n, mask=is_column, other=0.0)
    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    is_mine = (row < tl.load(tile + 2))[:, None] & is_column[None, :]
    y_at = y + row.to(tl.int64)[:, None] * y_stride + column + n[None, :]
    before = tl.load(y_at, mask=is_mine, other=0.0)
    scaled = before.to(tl.float32) * factor[None, :]
    tl.store(y_at, scaled.to(before.dtype), mask=is_mine)


def scale_output_(
    launch: Launch, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
) -> None:
    """As `ops.Ops.scale_output_`: nothing else of y is read or written."""
    assert y.stride(1) == 1
    assert lora.tiles is not None
    _, num_layers, num_modules = lora.tables.output_scale.shape
    modules, columns, widths = zip(*projections, strict=True)
    for tiles, rows in ((lora.tiles.short, TILE_ROWS), (lora.tiles.long, LONG_TILE_ROWS)):
        block_n = BLOCK // rows
        launch(
            _scale_output,
            (tiles.shape[0], sum(triton.cdiv(width, block_n) for width in widths)),
            y,
            lora.arena.view(torch.float32),
            lora.tables.output_scale,
            tiles,
            num_layers * num_modules,
            layer * num_modules,
            y.stride(0),
            MODULES=modules,
            COLUMNS=columns,
            WIDTHS=widths,
            ROWS=rows,
            BLOCK_N=block_n,
            num_warps=4,
        )
