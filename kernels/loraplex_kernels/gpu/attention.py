"""Causal grouped-query attention over the paged cache, for decode and prefill alike.

One kernel: the rows of a tile are query tokens times the query heads that share a kv head, its
columns are keys, found through the block table. softmax(q k^T / sqrt(dim)) v as a running sum over
the columns (online softmax: Milakov & Gimelshein 2018, tiled as in FlashAttention, Dao et al.
2022). A sequence of one query may share its keys out among several programs (Flash-Decoding), whose
results a second launch merges. How many depends on the configuration, and which keys each takes on
the sequence's context alone: so a row's bits do not depend on the rest of the batch.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch, configs
from loraplex_kernels.gpu.workspace import Workspace
from loraplex_kernels.ops import QUERY_TILE, AttentionInput


@triton.jit
def _span(first, context, WINDOW, QUERIES, KEYS, SPLITS):
    """Of the positions that QUERIES from `first` on see, those of this program's split."""
    begin = 0
    if WINDOW is not None:
        begin = tl.maximum(first - WINDOW + 1, 0)
    end = tl.minimum(first + QUERIES, context)
    size = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    begin += tl.program_id(2) * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def _weigh(score, scale, top, total):
    """2^(score * scale - top) for the new top; by what older sums shrink, top and total."""
    new_top = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weight, shrink, new_top, total * shrink + tl.sum(weight, 1)


@triton.jit(do_not_specialize=["table_width"])
def _attention(
    qkv,  # [T, (HEADS + 2 * KV_HEADS) * DIM]
    k_cache,  # [num_blocks, KV_HEADS, BLOCK_TOKENS, DIM]
    v_cache,  # the same
    out,  # [T, HEADS * DIM]
    partial,  # fp32 [T, HEADS, SPLITS, DIM], or None where SPLITS is 1
    state,  # fp32 [T, HEADS, SPLITS, 2], or None
    context_table,  # int32 [num_sequences]
    block_tables,  # int32 [num_sequences, table_width]
    query_starts,  # int32 [num_sequences + 1]; None: sequence i is row i
    query_tiles,  # int32 [n, 2]; None: tile i is sequence i
    table_width,
    block_stride,
    scale,  # log2(e) / sqrt(DIM)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least DIM
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,  # None: every key
    QUERIES: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,  # of a program: a part of QUERIES * GROUP, or more than that
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid (tiles, KV_HEADS * ceil(QUERIES * GROUP / ROWS), SPLITS).

    A program of several SPLITS leaves sum 2^(score - top) v in `partial` and top and
    sum 2^(score - top) in `state`. Keys that no row of the program sees are not read, and count as
    zeros; so a NaN stays with its own sequence.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile = tl.program_id(0)
    if query_tiles is None:
        sequence = tile
        first_query = 0
        start = tile
        num_queries = 1
    else:
        sequence = tl.load(query_tiles + tile * 2)
        first_query = tl.load(query_tiles + tile * 2 + 1)
        start = tl.load(query_starts + sequence)
        num_queries = tl.load(query_starts + sequence + 1) - start
    kv_head = tl.program_id(1) % KV_HEADS
    row = tl.program_id(1) // KV_HEADS * ROWS + tl.arange(0, ROWS)
    query = first_query + row // GROUP
    is_row = (row < QUERIES * GROUP) & (query < num_queries)
    d = tl.arange(0, COLUMNS)
    head_row = (start + query).to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP  # of out
    q_at = head_row + (start + query).to(tl.int64) * (2 * KV_HEADS)
    is_value = is_row[:, None] & (d < DIM)[None, :]
    q = tl.load(qkv + q_at[:, None] * DIM + d[None, :], mask=is_value, other=0.0)

    context = tl.load(context_table + sequence)
    position = context - num_queries + query
    first_position = context - num_queries + first_query
    begin, end = _span(first_position, context, WINDOW, QUERIES, KEYS, SPLITS)

    block_tables += sequence.to(tl.int64) * table_width
    k_cache += kv_head * (BLOCK_TOKENS * DIM)
    v_cache += kv_head * (BLOCK_TOKENS * DIM)
    # Lower than any score, yet finite: minus infinity less itself would be NaN.
    top = tl.full((ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_key in range(begin, end, KEYS):
        key = first_key + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(block_tables + key // BLOCK_TOKENS, mask=is_key, other=0).to(tl.int64)
        key_at = block * block_stride + key % BLOCK_TOKENS * DIM
        at = key_at[:, None] + d[None, :]
        is_cached = is_key[:, None] & (d < DIM)[None, :]
        k = tl.load(k_cache + at, mask=is_cached, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        is_seen = is_key[None, :]
        if QUERIES > 1:  # there is one split then, so that causality implies is_key
            distance = position[:, None] - key[None, :]
            is_seen = distance >= 0
            if WINDOW is not None:
                is_seen = distance.to(tl.uint32) < WINDOW  # the negative ones are large
        score = tl.where(is_seen, score, -float("inf"))
        weight, shrink, top, total = _weigh(score, scale, top, total)
        v = tl.load(v_cache + at, mask=is_cached, other=0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    if SPLITS == 1:
        # A padding row has no keys: zero. Where there are keys, 0 / 0 must stay NaN.
        acc = acc / tl.where(is_row & (context > 0), total, 1.0)[:, None]
        out_at = out + head_row[:, None] * DIM + d[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_value)
    else:
        part = head_row * SPLITS + tl.program_id(2)
        tl.store(state + part * 2, top, mask=is_row)
        tl.store(state + part * 2 + 1, total, mask=is_row)
        if begin < end:
            tl.store(partial + part[:, None] * DIM + d[None, :], acc, mask=is_value)


@triton.jit
def _merge(
    out,  # [T, HEADS * DIM]
    partial,  # as _attention left them; not written where total is 0
    state,
    context_table,  # int32 [T]
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least DIM
    SPLITS: tl.constexpr,
):
    """`out = sum_s 2^(top_s - top) partial_s / sum_s 2^(top_s - top) total_s`. Grid (T, HEADS)."""
    head_row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    d = tl.arange(0, COLUMNS)
    part = head_row * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(state + part * 2)
    total = tl.load(state + part * 2 + 1)
    is_value = (total != 0.0)[:, None] & (d < DIM)[None, :]
    acc = tl.load(partial + part[:, None] * DIM + d[None, :], mask=is_value, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    acc = tl.sum(acc * weight[:, None], 0)
    total = tl.sum(total * weight, 0)
    is_padding = tl.load(context_table + tl.program_id(0)) == 0
    acc = acc / tl.where(is_padding, 1.0, total)
    tl.store(out + head_row * DIM + d, acc.to(out.dtype.element_ty), mask=d < DIM)


def attention(
    launch: Launch,
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    where: AttentionInput,
    out: Tensor,
    window: int | None,
    workspace: Workspace,
    target: str,
) -> None:
    """As `ops.Ops.attention`: decode rows in one launch, or two with splits, then the prefills.

    Scores, softmax and sums in fp32; its weights are rounded to the cache's dtype for the product
    with v; fp32 is multiplied as fp32.
    """
    assert all(rows.is_contiguous() for rows in (qkv, out, where.block_tables, k_cache[0]))
    assert k_cache.stride() == v_cache.stride()
    assert where.query_tiles is not None
    tensors = _Tensors(qkv, k_cache, v_cache, out)
    if where.num_decode > 0:
        config = _config("decode", tensors, target)
        partials = _partials(workspace, where.num_decode, tensors, config["SPLITS"])
        _attend(launch, tensors, where, window, 1, partials, config)
        if config["SPLITS"] > 1:
            _merge_splits(launch, tensors, where, partials, config["SPLITS"])
    if where.query_tiles.shape[0] > 0:
        config = _config("prefill", tensors, target)
        _attend(launch, tensors, where, window, QUERY_TILE, (None, None), config)


class _Tensors(NamedTuple):
    """The step's activations and one layer's cache, and what their shapes say."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    out: Tensor

    @property
    def head_dim(self) -> int:
        return self.k_cache.shape[3]

    @property
    def columns(self) -> int:
        """Of a tile: a power of two, and for small heads as for those of 64."""
        return max(int(triton.next_power_of_2(self.head_dim)), 64)

    @property
    def heads(self) -> int:
        return self.out.shape[1] // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.k_cache.shape[1]


_Partials = tuple[Tensor | None, Tensor | None]


def _config(use: str, tensors: _Tensors, target: str) -> Mapping[str, int]:
    """ "decode_128": by the width of a tile's columns."""
    return configs("attention", target)[f"{use}_{tensors.columns}"]


def _partials(workspace: Workspace, num_rows: int, tensors: _Tensors, splits: int) -> _Partials:
    if splits == 1:
        return None, None
    shape = (num_rows, tensors.heads, splits)
    partial = workspace.take("attention_partial", (*shape, tensors.head_dim), torch.float32)
    return partial, workspace.take("attention_state", (*shape, 2), torch.float32)


def _attend(
    launch: Launch,
    tensors: _Tensors,
    where: AttentionInput,
    window: int | None,
    queries: int,
    partials: _Partials,
    config: Mapping[str, int],
) -> None:
    """The decode rows where a tile has one query, else the tiles of many."""
    starts, tiles = (None, None) if queries == 1 else (where.query_start_table, where.query_tiles)
    num_tiles = where.num_decode if tiles is None else tiles.shape[0]
    meta = dict(config)
    group = tensors.heads // tensors.kv_heads
    # A dot has at least 16 rows.
    rows = min(max(triton.next_power_of_2(queries * group), 16), meta.pop("MAX_ROWS"))
    num_warps = max(rows // meta.pop("WARP_ROWS"), 4)
    launch(
        _attention,
        (num_tiles, tensors.kv_heads * triton.cdiv(queries * group, rows), meta["SPLITS"]),
        *tensors,
        *partials,
        where.context_table,
        where.block_tables,
        starts,
        tiles,
        where.block_tables.stride(0),
        tensors.k_cache.stride(0),
        math.log2(math.e) / math.sqrt(tensors.head_dim),
        HEADS=tensors.heads,
        KV_HEADS=tensors.kv_heads,
        DIM=tensors.head_dim,
        COLUMNS=tensors.columns,
        BLOCK_TOKENS=tensors.k_cache.shape[2],
        WINDOW=window,
        QUERIES=queries,
        ROWS=rows,
        num_warps=num_warps,
        **meta,
    )


def _merge_splits(
    launch: Launch, tensors: _Tensors, where: AttentionInput, partials: _Partials, splits: int
) -> None:
    launch(
        _merge,
        (where.num_decode, tensors.heads),
        tensors.out,
        *partials,
        where.context_table,
        HEADS=tensors.heads,
        DIM=tensors.head_dim,
        COLUMNS=tensors.columns,
        SPLITS=splits,
        num_warps=1,
    )
