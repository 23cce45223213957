"""The NF4 linear for up to 64 rows, with the LoRA update in its epilogue, and dequantisation.

`out = x W^T` for W in bitsandbytes' layout (`loraplex_kernels.nf4`). The weight is the dot's first
operand, so that few tokens waste little: out^T = W x^T. The even and the odd elements of a row,
high and low nibbles, are two dots. Codes are looked up as 16-bit floats, and absmax scales the
fp32 sum over its block of 64, so that a weight is rounded once, as a code:

    out[t, n] = sum over blocks b of absmax[n, b] * sum over k in b of round(code[n, k]) * x[t, k]

Where W has too few rows to fill a device, each program sums a slice of K into

    parts, fp32 [slices, num_rows, N]

and a second launch adds those up in their order. Programs of one launch do not communicate.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu import lora as lora_kernels
from loraplex_kernels.gpu.launch import Launch, configs
from loraplex_kernels.gpu.lora import weights_at
from loraplex_kernels.gpu.nf4_decode import decode_by_permute, decode_by_shift, permute_operands
from loraplex_kernels.gpu.workspace import Workspace
from loraplex_kernels.granules import GRANULE_RANK
from loraplex_kernels.nf4 import BLOCK_SIZE, NF4Weight
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.segments import LONG_TILE_ROWS, TILE_ROWS

MAX_ROWS = LONG_TILE_ROWS
"""Of x; so few that every segment is in short tiles."""

TOKENS = (16, 32, 64)
"""Rows of x that a program can take; "rows_16", ... are the configurations."""

_RANK = tl.constexpr(GRANULE_RANK)
_TILE = tl.constexpr(TILE_ROWS)
_CHUNK = tl.constexpr(4)


@triton.jit
def _sum_blocks(
    x,
    codes,
    absmax,
    row,  # int32 [TOKENS], all of them rows of x
    n,  # int32 [BLOCK_N], all of them rows of W
    first,
    end,
    num_rows,
    x_stride,
    K: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    IS_NVIDIA: tl.constexpr,
):
    """fp32 [BLOCK_N, TOKENS]: out^T, summed over the blocks first..end of 64 elements of K."""
    dtype: tl.constexpr = x.dtype.element_ty
    byte = tl.arange(0, 32)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + first * 64 + tl.arange(0, 64)[None, :]
    codes_at = codes + n.to(tl.int64)[:, None] * (K // 2) + first * 32 + byte[None, :]
    absmax_at = absmax + n.to(tl.int64) * (K // 64) + first
    if IS_NVIDIA:
        operands = permute_operands(codes, (byte * 0 + num_rows < 0)[None, :], dtype)
    acc = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    for _ in tl.range(first, end, UNROLL, num_stages=STAGES):
        for i in tl.static_range(UNROLL):
            packed = tl.load(codes_at + i * 32)
            if IS_NVIDIA:
                even, odd = decode_by_permute(packed, operands, dtype)
            else:
                even, odd = decode_by_shift(packed, dtype)
            x_even, x_odd = tl.split(tl.reshape(tl.load(x_at + i * 64), (row.shape[0], 32, 2)))
            block = tl.dot(even, tl.trans(x_even))
            block = tl.dot(odd, tl.trans(x_odd), block)
            acc += block * tl.load(absmax_at + i)[:, None]
        x_at += UNROLL * 64
        codes_at += UNROLL * 32
        absmax_at += UNROLL
    return acc


@triton.jit
def _add_lora(
    acc,  # fp32 [BLOCK_N, TOKENS], out^T
    column,  # of out, that acc begins with
    token,  # row of out, that acc begins with; a multiple of _TILE
    partial,  # fp32 [split, num_rows, projections * granules * _RANK], as lora.shrink leaves it
    arena,  # in the adapters' dtype
    offset,  # int64 [slots, slot_entries, granules, 2]
    scale,  # fp32 [slots, slot_entries, granules]
    num_granules,  # int32 [slots, slot_entries]
    tiles,  # int32 [capacity, 3]
    starts,  # int32 [ceil(num_rows / _TILE) + 1]
    slot_entries,  # layers * modules, of the tables
    first_entry,  # of this layer
    num_rows,
    PROJECTIONS: tl.constexpr,  # (module, column, width) of each
    ADAPTERS: tl.constexpr,  # granules, split
):
    """acc + scale * B v, v the sum of the partials, for every row with an adapter.

    Walks the short tiles of these rows, for each projection that has some of these columns. A dot
    takes a granule of each of _CHUNK tiles, one under another, v being 0 outside its tile: so that
    many adapters wait for memory together. Loaded weights are finite, and 0 times them is 0. What
    no tile or granule covers is not read: it was never written.
    """
    granules: tl.constexpr = ADAPTERS[0]
    row_size: tl.constexpr = len(PROJECTIONS) * granules * _RANK
    n = column + tl.arange(0, acc.shape[0])
    row = token + tl.arange(0, acc.shape[1])[None, :]
    i = tl.arange(0, _CHUNK * _RANK)
    j = tl.arange(0, _RANK)
    end = tl.minimum(token + acc.shape[1], num_rows)
    first_tile = tl.load(starts + token // _TILE)
    last_tile = tl.load(starts + tl.cdiv(end, _TILE))
    for p in tl.range(0, len(PROJECTIONS), num_stages=1):  # not unrolled: registers are scarce
        module, lo, width = PROJECTIONS[0]
        for q in tl.static_range(1, len(PROJECTIONS)):
            module = tl.where(p == q, PROJECTIONS[q][0], module)
            lo = tl.where(p == q, PROJECTIONS[q][1], lo)
            width = tl.where(p == q, PROJECTIONS[q][2], width)
        if (column < lo + width) & (column + acc.shape[0] > lo):
            is_column = (n >= lo) & (n < lo + width)
            for chunk in tl.range(first_tile, last_tile, _CHUNK, num_stages=1):
                tile = chunk + i // _RANK
                is_tile = tile < last_tile
                slot = tl.load(tiles + tile * 3, mask=is_tile, other=0)
                row_lo = tl.load(tiles + tile * 3 + 1, mask=is_tile, other=0)[:, None]
                row_hi = tl.load(tiles + tile * 3 + 2, mask=is_tile, other=0)[:, None]
                is_row = (row >= row_lo) & (row < row_hi)
                entry = slot * slot_entries + first_entry + module
                count = tl.load(num_granules + entry, mask=is_tile, other=0)
                v_at = partial + (row * row_size).to(tl.int64) + (j + p * granules * _RANK)[:, None]
                for granule in tl.range(0, tl.max(count, 0), num_stages=1):
                    has = granule < count
                    at = entry * granules + granule
                    b = weights_at(arena, tl.load(offset + at * 2 + 1, mask=has, other=0))
                    b_at = (b + i % _RANK * width)[None, :] + (n - lo)[:, None]
                    is_there = has[None, :] & is_column[:, None]
                    b_tile = tl.load(b_at, mask=is_there, other=0.0)
                    is_mine = is_row & has[:, None]
                    is_used = tl.max(is_mine.to(tl.int32), 0, keep_dims=True) > 0
                    v = tl.zeros((_RANK, acc.shape[1]), tl.float32)
                    for s in tl.static_range(ADAPTERS[1]):
                        part_at = v_at + num_rows.to(tl.int64) * (s * row_size)
                        v += tl.load(part_at, mask=is_used, other=0.0)
                    v = tl.broadcast_to(v[None, :, :], (_CHUNK, _RANK, acc.shape[1]))
                    v = tl.reshape(v, (_CHUNK * _RANK, acc.shape[1]))
                    v *= tl.load(scale + at, mask=has, other=0.0)[:, None]
                    v = tl.where(is_mine, v, 0.0).to(b_tile.dtype)
                    acc = tl.dot(b_tile, v, acc, input_precision="ieee")
                    v_at += _RANK
    return acc


@triton.jit(do_not_specialize=["slot_entries", "first_entry", "num_rows"])
def _linear(
    x,  # [num_rows, K]
    codes,  # uint8 [N, K / 2]
    absmax,  # fp32 [N * K / 64]
    out,  # [num_rows, N]; with SLICES > 1, the parts
    partial,  # these as in _add_lora; None where there is nothing to add
    arena,
    offset,
    scale,
    num_granules,
    tiles,
    starts,
    slot_entries,
    first_entry,
    num_rows,
    x_stride,
    out_stride,
    PROJECTIONS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SLICE: tl.constexpr,  # of K, for one program, in blocks of 64; a multiple of UNROLL
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    IS_NVIDIA: tl.constexpr,
):
    """BLOCK_N columns of out, or of one part. Grid (ceil(N / BLOCK_N), slices).

    Rows and columns that are not there are computed from the last one, and not stored.
    """
    column = tl.program_id(0) * BLOCK_N
    n = column + tl.arange(0, BLOCK_N)
    row = tl.arange(0, TOKENS)
    first = tl.program_id(1) * SLICE
    acc = _sum_blocks(
        x,
        codes,
        absmax,
        tl.minimum(row, num_rows - 1),
        tl.minimum(n, N - 1),
        first,
        tl.minimum(first + SLICE, K // 64),
        num_rows,
        x_stride,
        K,
        UNROLL,
        STAGES,
        IS_NVIDIA,
    )
    if len(PROJECTIONS) > 0:
        acc = _add_lora(
            acc,
            column,
            0,
            partial,
            arena,
            offset,
            scale,
            num_granules,
            tiles,
            starts,
            slot_entries,
            first_entry,
            num_rows,
            PROJECTIONS,
            ADAPTERS,
        )
    is_mine = (row < num_rows)[None, :] & (n < N)[:, None]
    row = row.to(tl.int64) + tl.program_id(1).to(tl.int64) * num_rows
    at = out + row[None, :] * out_stride + n[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=is_mine)


@triton.jit(do_not_specialize=["slot_entries", "first_entry", "num_rows"])
def _merge(
    parts,  # fp32 [SLICES, num_rows, N]
    out,  # [num_rows, N]
    partial,  # these as in _add_lora; None where there is nothing to add
    arena,
    offset,
    scale,
    num_granules,
    tiles,
    starts,
    slot_entries,
    first_entry,
    num_rows,
    out_stride,
    PROJECTIONS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The parts' sum, in their order, and the update. Grid (ceil(N / BLOCK_N), row groups)."""
    column = tl.program_id(0) * BLOCK_N
    token = tl.program_id(1) * _TILE
    n = column + tl.arange(0, BLOCK_N)
    row = token + tl.arange(0, _TILE)
    is_mine = (row < num_rows)[None, :] & (n < N)[:, None]
    row = row.to(tl.int64)
    at = parts + row[None, :] * N + n[:, None]
    acc = tl.zeros((BLOCK_N, _TILE), tl.float32)
    for _ in tl.static_range(SLICES):
        acc += tl.load(at, mask=is_mine, other=0.0)
        at += num_rows.to(tl.int64) * N
    if len(PROJECTIONS) > 0:
        acc = _add_lora(
            acc,
            column,
            token,
            partial,
            arena,
            offset,
            scale,
            num_granules,
            tiles,
            starts,
            slot_entries,
            first_entry,
            num_rows,
            PROJECTIONS,
            ADAPTERS,
        )
    at = out + row[None, :] * out_stride + n[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=is_mine)


@triton.jit
def _dequantize(
    codes,  # uint8 [num_blocks, 32]
    absmax,  # fp32 [num_blocks]
    levels,  # fp32 [16]
    out,  # [num_blocks, 64]
    num_blocks,
    BLOCKS: tl.constexpr,
):
    """`out = round(level * absmax)`, to bf16 whatever out is; BLOCKS blocks of 64 a program."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < num_blocks
    packed_at = codes + block[:, None] * 32 + tl.arange(0, 32)[None, :]
    packed = tl.load(packed_at, mask=is_block[:, None], other=0)
    scale = tl.load(absmax + block, mask=is_block, other=0.0)[:, None]
    even = tl.load(levels + (packed >> 4)) * scale
    odd = tl.load(levels + (packed & 0xF)) * scale
    values = tl.reshape(tl.join(even, odd), (BLOCKS, 64))
    at = out + block[:, None] * 64 + tl.arange(0, 64)[None, :]
    rounded = values.to(tl.bfloat16).to(out.dtype.element_ty)
    tl.store(at, rounded, mask=is_block[:, None])


def supports(dtype: torch.dtype, weight: NF4Weight) -> bool:
    """Whether `nf4_linear` can multiply this weight with activations of `dtype`."""
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and weight.in_features % BLOCK_SIZE == 0 and weight.codes.is_contiguous()


def nf4_linear(
    launch: Launch,
    x: Tensor,
    weight: NF4Weight,
    lora: LoraInput,
    layer: int,
    projections: tuple[Projection, ...],
    out: Tensor,
    workspace: Workspace,
    target: str,
) -> None:
    """As `ops.Ops.linear` for up to MAX_ROWS rows; the weight's levels must be NF4's.

    Up to three launches: v = A x where a row has an adapter, the product, and the parts' sum where
    K is cut in slices.
    """
    num_rows, k = x.shape
    n = weight.out_features
    assert 0 < num_rows <= MAX_ROWS
    assert supports(x.dtype, weight)
    assert x.stride(1) == out.stride(1) == 1
    tokens = next(size for size in TOKENS if num_rows <= size)
    config = dict(configs("nf4", target)[f"rows_{tokens}"])
    if k // BLOCK_SIZE % config["UNROLL"] != 0:
        config["UNROLL"] = 1
    slice_size = _slice_size(n, k, tokens, config.pop("PROGRAMS"), config)
    num_slices = triton.cdiv(k // BLOCK_SIZE, slice_size)
    adapters, shape = _NO_ADAPTERS
    if lora.has_adapters:
        partial = lora_kernels.shrink(launch, x, lora, layer, projections, workspace, target)
        adapters, shape = _adapter_arguments(lora, layer, projections, partial)
    is_cut = num_slices > 1
    product = (
        workspace.take("nf4_parts", (num_slices, num_rows, n), torch.float32) if is_cut else out
    )
    launch(
        _linear,
        (triton.cdiv(n, config["BLOCK_N"]), num_slices),
        x,
        weight.codes,
        weight.absmax,
        product,
        *(_NO_ADAPTERS[0] if is_cut else adapters),
        num_rows,
        x.stride(0),
        product.stride(-2),
        **(_NO_ADAPTERS[1] if is_cut else shape),
        N=n,
        K=k,
        SLICE=slice_size,
        TOKENS=tokens,
        STAGES=config["num_stages"],
        IS_NVIDIA=target.startswith("sm_"),
        **config,
    )
    if is_cut:
        config = dict(configs("nf4", target)["merge"])
        launch(
            _merge,
            (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(num_rows, TILE_ROWS)),
            product,
            out,
            *adapters,
            num_rows,
            out.stride(0),
            **shape,
            N=n,
            SLICES=num_slices,
            **config,
        )


def dequantize(launch: Launch, weight: NF4Weight, out: Tensor) -> None:
    """`out = weight.dequantize()`, the same bf16 values bit for bit, in out's dtype."""
    assert out.is_contiguous()
    assert weight.in_features % BLOCK_SIZE == 0
    config = configs("nf4", "default")["dequantize"]
    num_blocks = weight.absmax.numel()
    launch(
        _dequantize,
        (triton.cdiv(num_blocks, config["BLOCKS"]),),
        weight.codes,
        weight.absmax,
        weight.code,
        out,
        num_blocks,
        **config,
    )


_NO_ADAPTERS: tuple[tuple[Tensor | int | None, ...], dict[str, Any]] = (
    (*(None,) * 7, 0, 0),
    {"PROJECTIONS": (), "ADAPTERS": ()},
)


def _adapter_arguments(
    lora: LoraInput, layer: int, projections: tuple[Projection, ...], partial: Tensor
) -> tuple[tuple[Tensor | int | None, ...], dict[str, Any]]:
    """What `_add_lora` takes, `partial` to `first_entry`, and what is compiled in."""
    tables, tiles = lora.tables, lora.tiles
    assert tiles is not None
    _, num_layers, num_modules, granules = tables.scale.shape
    arena = lora.arena.view(lora.dtype)
    pointers = (partial, arena, tables.offset, tables.scale, tables.num_granules)
    shape = {
        "PROJECTIONS": tuple(tuple(projection) for projection in projections),
        "ADAPTERS": (granules, partial.shape[0]),
    }
    entries = (num_layers * num_modules, layer * num_modules)
    return (*pointers, tiles.short, tiles.starts, *entries), shape


def _slice_size(n: int, k: int, tokens: int, programs: int, config: dict[str, int]) -> int:
    """Blocks of 64 for one program, such that about `programs` of them share the weight.

    So many slices only that the parts, written and read, have at most as many bytes as the codes.
    """
    num_blocks = k // BLOCK_SIZE
    num_slices = min(programs // triton.cdiv(n, config["BLOCK_N"]), k // (16 * tokens))
    steps = triton.cdiv(num_blocks, config["UNROLL"])
    return int(triton.cdiv(steps, max(num_slices, 1))) * config["UNROLL"]
