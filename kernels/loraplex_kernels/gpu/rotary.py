"""Rotary embedding and the write to the KV cache: one launch, a program a token and kv head."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch


@triton.jit
def _rotary_and_cache(
    qkv,  # [T, (HEADS + 2 * KV_HEADS) * 2 * HALF], q and k turned in place
    cos,  # fp32 [T, HALF]
    sin,  # fp32 [T, HALF]
    k_cache,  # [num_blocks, KV_HEADS, BLOCK_TOKENS, 2 * HALF]
    v_cache,  # the same
    slot_mapping,  # int64 [T]
    block_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of head_dim
    BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,  # at least HEADS // KV_HEADS + 2
    COLUMNS: tl.constexpr,  # at least HALF
):
    """Grid (T, KV_HEADS). Tile rows: the query heads of one kv head, then its k, then its v.

    v goes through the tile unturned, so that it too is read and written in wide accesses.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_column = column < HALF

    head = tl.where(row < GROUP, kv_head * GROUP + row, HEADS + (row - GROUP) * KV_HEADS + kv_head)
    at = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + column
    mask = (row < GROUP + 2) & is_column
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + column, mask=is_column, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=is_column, other=0.0)
    is_turned = row <= GROUP
    new_low = tl.where(is_turned, low * c - high * s, low).to(qkv.dtype.element_ty)
    new_high = tl.where(is_turned, high * c + low * s, high).to(qkv.dtype.element_ty)
    tl.store(at, new_low, mask=is_turned & is_column)
    tl.store(at + HALF, new_high, mask=is_turned & is_column)

    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        within = (kv_head * BLOCK_TOKENS + slot % BLOCK_TOKENS) * (2 * HALF)
        cached_at = slot // BLOCK_TOKENS * block_stride + within + column
        cached_at = tl.broadcast_to(cached_at, (ROWS, COLUMNS))
        is_k = (row == GROUP) & is_column
        is_v = (row == GROUP + 1) & is_column
        tl.store(k_cache + cached_at, new_low, mask=is_k)
        tl.store(k_cache + cached_at + HALF, new_high, mask=is_k)
        tl.store(v_cache + cached_at, new_low, mask=is_v)
        tl.store(v_cache + cached_at + HALF, new_high, mask=is_v)


def rotary_and_cache(
    launch: Launch,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """As `ops.Ops.rotary_and_cache`: turned in fp32 and rounded once; what is cached is that."""
    assert all(tensor.is_contiguous() for tensor in (qkv, cos, sin, k_cache[0]))
    assert k_cache.stride() == v_cache.stride()
    _, kv_heads, block_tokens, head_dim = k_cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    half = head_dim // 2
    columns = triton.next_power_of_2(half)
    # At least as many as one warp, of 64 threads too, reads in whole 128-bit accesses.
    rows = max(triton.next_power_of_2(heads // kv_heads + 2), 512 // columns)
    launch(
        _rotary_and_cache,
        (qkv.shape[0], kv_heads),
        qkv,
        cos,
        sin,
        k_cache,
        v_cache,
        slot_mapping,
        k_cache.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_TOKENS=block_tokens,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=min(rows * columns // 512, 8),
    )
