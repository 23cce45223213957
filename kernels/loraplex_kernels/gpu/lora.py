"""Segmented multi-adapter LoRA: `y[t, p] += scale * B (A x[t])` for every tile and projection.

Two launches for each list of tiles: `shrink` writes v = A x in parts, one a slice of K, and
`expand` sums the parts, scales them and adds B v to y. Programs of one launch do not communicate:
no atomics, nothing zeroed beforehand, and the same bits every time.

The parts, fp32 `[split, num_rows, num_projections * granules * 16]`, granules being those of the
tables (the largest rank / 16):

    partial[s, t, (p * granules + g) * 16 + j] = sum over k in slice s of x[t, k] * A_{p, g}[j, k]

for the slot of row t, projection number p of the call and g < num_granules[slot, layer, module of
p]. Everything else is never written, and must not be read: rows that are in no tile of the list,
granules that the adapter does not have.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch, configs
from loraplex_kernels.gpu.workspace import Workspace
from loraplex_kernels.granules import GRANULE_RANK
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.segments import LONG_TILE_ROWS, TILE_ROWS

Length = Literal["short", "long"]
"""Which of the two tile lists; the configurations are "shrink_short", "expand_long", ..."""


@triton.jit
def weights_at(arena, offset):
    """Where a granule's matrix starts, `arena` in the weights' dtype; a multiple of 64 bytes."""
    item_bytes: tl.constexpr = arena.dtype.element_ty.primitive_bitwidth // 8
    return arena + tl.multiple_of(offset // item_bytes, 16)


@triton.jit
def columns_of(
    program,
    MODULES: tl.constexpr,  # of the projections
    COLUMNS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a program: its projection, that one's module, column and width, and which BLOCK_N of it.

    There are as many as the sum over projections of ceil(width / BLOCK_N).
    """
    projection = 0
    module = MODULES[0]
    column = COLUMNS[0]
    width = WIDTHS[0]
    block = program
    start = 0
    for i in tl.static_range(1, len(MODULES)):
        start += tl.cdiv(WIDTHS[i - 1], BLOCK_N)
        is_here = program >= start
        projection = tl.where(is_here, i, projection)
        module = tl.where(is_here, MODULES[i], module)
        column = tl.where(is_here, COLUMNS[i], column)
        width = tl.where(is_here, WIDTHS[i], width)
        block = tl.where(is_here, program - start, block)
    return projection, module, column, width, block


@triton.jit(do_not_specialize=["slot_entries", "first_entry", "num_rows"])
def _shrink(
    x,  # [num_rows, K]
    arena,  # in the weights' dtype
    offset,  # int64 [slots, slot_entries, GRANULES, 2]
    num_granules,  # int32 [slots, slot_entries]
    tiles,  # int32 [capacity, 3]
    partial,  # fp32 [split, num_rows, len(MODULES) * GRANULES * RANK]
    slot_entries,  # layers * modules, of the tables
    first_entry,  # of this layer
    num_rows,
    x_stride,
    MODULES: tl.constexpr,  # of the projections
    GRANULES: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    K_SLICE: tl.constexpr,  # of one program, a multiple of BLOCK_K
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One granule of one projection, for one tile and one slice of K.

    Grid (tiles, projections * GRANULES, split). Tokens are the dot's rows and ranks its columns:
    from Hopper on an instruction has at least 64 rows, as a long tile does.
    """
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile)
    if slot < 0:
        return
    part = tl.program_id(1)
    module = MODULES[0]
    for i in tl.static_range(1, len(MODULES)):
        module = tl.where(part >= i * GRANULES, MODULES[i], module)
    entry = slot * slot_entries + first_entry + module
    granule = part % GRANULES
    if granule >= tl.load(num_granules + entry):
        return
    a = weights_at(arena, tl.load(offset + (entry * GRANULES + granule) * 2))

    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    is_row = row < tl.load(tile + 2)
    row = row.to(tl.int64)
    j = tl.arange(0, RANK)
    k = tl.program_id(2) * K_SLICE + tl.arange(0, BLOCK_K)
    end = tl.minimum(tl.program_id(2) * K_SLICE + K_SLICE, K)
    v = tl.zeros((ROWS, RANK), tl.float32)
    for _ in range(tl.program_id(2) * K_SLICE, end, BLOCK_K):
        x_at = x + row[:, None] * x_stride + k[None, :]
        a_at = a + j[None, :] * K + k[:, None]
        if K % BLOCK_K == 0:
            x_tile = tl.load(x_at, mask=is_row[:, None], other=0.0)
            a_tile = tl.load(a_at)
        else:
            x_tile = tl.load(x_at, mask=is_row[:, None] & (k < K)[None, :], other=0.0)
            a_tile = tl.load(a_at, mask=(k < K)[:, None], other=0.0)
        v = tl.dot(x_tile.to(a_tile.dtype), a_tile, v, input_precision="ieee")
        k += BLOCK_K

    row_size: tl.constexpr = len(MODULES) * GRANULES * RANK
    at = (tl.program_id(2).to(tl.int64) * num_rows + row) * row_size + part * RANK
    tl.store(partial + at[:, None] + j[None, :], v, mask=is_row[:, None])


@triton.jit(do_not_specialize=["slot_entries", "first_entry", "num_rows"])
def _expand(
    y,  # [num_rows, N]
    partial,  # fp32 [SPLIT, num_rows, len(MODULES) * GRANULES * RANK]
    arena,  # in the weights' dtype
    offset,  # int64 [slots, slot_entries, GRANULES, 2]
    scale,  # fp32 [slots, slot_entries, GRANULES]
    num_granules,  # int32 [slots, slot_entries]
    tiles,  # int32 [capacity, 3]
    slot_entries,  # layers * modules, of the tables
    first_entry,  # of this layer
    num_rows,
    y_stride,
    MODULES: tl.constexpr,  # of the projections
    COLUMNS: tl.constexpr,  # where they start in y
    WIDTHS: tl.constexpr,
    GRANULES: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
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
    projection, module, column, width, block = columns_of(
        tl.program_id(1), MODULES, COLUMNS, WIDTHS, BLOCK_N
    )
    entry = slot * slot_entries + first_entry + module
    count = tl.load(num_granules + entry)
    if count == 0:
        return

    row = tl.load(tile + 1) + tl.arange(0, ROWS)
    is_row = row < tl.load(tile + 2)
    row = row.to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < width
    y_at = y + row[:, None] * y_stride + column + n[None, :]
    is_mine = is_row[:, None] & is_column[None, :]
    before = tl.load(y_at, mask=is_mine, other=0.0)

    row_size: tl.constexpr = len(MODULES) * GRANULES * RANK
    j = tl.arange(0, RANK)
    v_at = partial + (row * row_size + projection * GRANULES * RANK)[:, None] + j[None, :]
    split_stride = num_rows.to(tl.int64) * row_size
    update = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for granule in range(count):
        at = entry * GRANULES + granule
        b = weights_at(arena, tl.load(offset + at * 2 + 1))
        b_tile = tl.load(b + j[:, None] * width + n[None, :], mask=is_column[None, :], other=0.0)
        v = tl.zeros((ROWS, RANK), tl.float32)
        for s in tl.static_range(SPLIT):
            v += tl.load(v_at + s * split_stride, mask=is_row[:, None], other=0.0)
        v = (v * tl.load(scale + at)).to(b_tile.dtype)
        update = tl.dot(v, b_tile, update, input_precision="ieee")
        v_at += RANK
    tl.store(y_at, (before.to(tl.float32) + update).to(before.dtype), mask=is_mine)


def lora_(
    launch: Launch,
    y: Tensor,
    x: Tensor,
    lora: LoraInput,
    layer: int,
    projections: tuple[Projection, ...],
    workspace: Workspace,
    target: str,
) -> None:
    """As `ops.Ops.lora_`: v in fp32, rounded once, when scaled, to the weights' dtype."""
    for length in _LENGTHS:
        if _tiles(lora, length).shape[0] > 0:
            partial = shrink(launch, x, lora, layer, projections, workspace, target, length)
            expand(launch, y, partial, lora, layer, projections, target, length)


def shrink(
    launch: Launch,
    x: Tensor,
    lora: LoraInput,
    layer: int,
    projections: tuple[Projection, ...],
    workspace: Workspace,
    target: str,
    length: Length = "short",
) -> Tensor:
    """The parts of v = A x for the rows of one tile list, laid out as at the top of this file.

    x `[num_rows, K]` in any float dtype, rounded to the weights' when those are narrower. Returns
    fp32 `[split, num_rows, num_projections * granules * 16]`, good until the next call; split
    depends on K and the configuration only. To have v, sum the parts in their order.
    """
    assert x.stride(1) == 1
    tables, tiles = lora.tables, _tiles(lora, length)
    _, num_layers, num_modules, granules = tables.scale.shape
    num_rows, k = x.shape
    config = dict(configs("lora", target)[f"shrink_{length}"])
    k_slice = slice_of(k, config["BLOCK_K"], config.pop("MAX_SPLIT"))
    split = triton.cdiv(k, k_slice)
    partial = partial_buffer(workspace, num_rows, len(projections), granules, split)
    launch(
        _shrink,
        (tiles.shape[0], len(projections) * granules, split),
        x,
        lora.arena.view(lora.dtype),
        tables.offset,
        tables.num_granules,
        tiles,
        partial,
        num_layers * num_modules,
        layer * num_modules,
        num_rows,
        x.stride(0),
        MODULES=tuple(projection.module for projection in projections),
        GRANULES=granules,
        RANK=GRANULE_RANK,
        K=k,
        K_SLICE=k_slice,
        ROWS=_ROWS[length],
        **config,
    )
    return partial


def expand(
    launch: Launch,
    y: Tensor,
    partial: Tensor,
    lora: LoraInput,
    layer: int,
    projections: tuple[Projection, ...],
    target: str,
    length: Length = "short",
) -> None:
    """`y[t, column_p + n] += sum_j round(scale * v[t, p, j]) * B_p[n, j]`, read and written once.

    v = partial.sum(0), as `shrink` left it for the same tile list. Columns of modules that the
    row's adapter lacks are not written.
    """
    assert y.stride(1) == 1
    tables, tiles = lora.tables, _tiles(lora, length)
    _, num_layers, num_modules, granules = tables.scale.shape
    config = configs("lora", target)[f"expand_{length}"]
    modules, columns, widths = zip(*projections, strict=True)
    launch(
        _expand,
        (tiles.shape[0], sum(triton.cdiv(width, config["BLOCK_N"]) for width in widths)),
        y,
        partial,
        lora.arena.view(lora.dtype),
        tables.offset,
        tables.scale,
        tables.num_granules,
        tiles,
        num_layers * num_modules,
        layer * num_modules,
        y.shape[0],
        y.stride(0),
        MODULES=modules,
        COLUMNS=columns,
        WIDTHS=widths,
        GRANULES=granules,
        RANK=GRANULE_RANK,
        SPLIT=partial.shape[0],
        ROWS=_ROWS[length],
        **config,
    )


def partial_buffer(
    workspace: Workspace, num_rows: int, num_projections: int, granules: int, split: int
) -> Tensor:
    """Where the parts go; not initialised."""
    shape = (split, num_rows, num_projections * granules * GRANULE_RANK)
    return workspace.take("lora_partial", shape, torch.float32)


def slice_of(k: int, block_k: int, max_split: int) -> int:
    """How much of K one program sums: whole blocks, as evenly as they go.

    By shape and configuration only, so that a row's sum is the same whatever else is in the batch.
    """
    blocks = -(-k // block_k)
    return -(-blocks // max_split) * block_k


_LENGTHS: tuple[Length, ...] = ("short", "long")
_ROWS: dict[Length, int] = {"short": TILE_ROWS, "long": LONG_TILE_ROWS}


def _tiles(lora: LoraInput, length: Length) -> Tensor:
    assert lora.tiles is not None
    return lora.tiles.short if length == "short" else lora.tiles.long
