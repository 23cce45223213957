"""A paged KV cache for tests: NaN but for its sequences' own tokens, as one layer of an arena."""

import math
from collections.abc import Sequence

import torch
from loraplex_kernels.ops import QUERY_TILE, AttentionInput
from torch import Tensor

from tests.kernels.inputs import Heads, Paged


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), torch.nan, dtype=dtype)


def empty_cache(
    num_blocks: int, heads: Heads, block_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The second of two layers of NaN: k and v, `[num_blocks, kv_heads, block_tokens, dim]`."""
    cache = poisoned((num_blocks, 2, 2, heads.kv, block_tokens, heads.dim), dtype)
    return cache[:, 1, 0], cache[:, 1, 1]


def paged(
    decodes: Sequence[int],
    prefills: Sequence[tuple[int, int]],
    heads: Heads,
    block_tokens: int,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> Paged:
    """Decode rows of these contexts, 0 being padding, then prefills of (context, queries)."""
    contexts = [*decodes, *(context for context, _ in prefills)]
    queries = [1] * len(decodes) + [count for _, count in prefills]
    num_blocks = [-(-context // block_tokens) for context in contexts]
    k_cache, v_cache = empty_cache(sum(num_blocks) + 3, heads, block_tokens, dtype)
    shuffled = torch.randperm(k_cache.shape[0], generator=rng).tolist()
    tables = torch.full((len(contexts), max(num_blocks) + 1), shuffled.pop(), dtype=torch.int32)
    k, v = [], []
    for index, context in enumerate(contexts):
        blocks = torch.tensor([shuffled.pop() for _ in range(num_blocks[index])], dtype=torch.int32)
        tables[index, : len(blocks)] = blocks
        k.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        v.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        token = torch.arange(context)
        block, offset = blocks[token // block_tokens], token % block_tokens
        k_cache[block, :, offset] = k[-1]
        v_cache[block, :, offset] = v[-1]
    starts = [sum(queries[:index]) for index in range(len(queries) + 1)]
    qkv = poisoned((starts[-1], heads.query + 2 * heads.kv, heads.dim), dtype)
    qkv[:, : heads.query] = torch.randn(starts[-1], heads.query, heads.dim, generator=rng) * 2
    where = attention_input(len(decodes), starts, contexts, tables)
    return Paged(qkv.flatten(1), k_cache, v_cache, where, k, v)


def attention_input(
    num_decode: int, starts: list[int], contexts: list[int], tables: Tensor
) -> AttentionInput:
    """As the batch builds it for ops that read tiles."""
    tiles = [
        (index, first)
        for index in range(num_decode, len(contexts))
        for first in range(0, starts[index + 1] - starts[index], QUERY_TILE)
    ]
    return AttentionInput(
        num_decode=num_decode,
        query_starts=starts,
        context_lens=contexts,
        context_table=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        query_start_table=torch.tensor(starts, dtype=torch.int32),
        query_tiles=torch.tensor(tiles, dtype=torch.int32).view(-1, 2),
    )


def attention_reference(data: Paged, heads: Heads, window: int | None) -> Tensor:
    """In fp32, a sequence at a time, every score written out."""
    q = data.qkv.view(data.qkv.shape[0], -1, heads.dim)[:, : heads.query].float()
    out = torch.zeros_like(q)
    starts = data.where.query_starts
    for index, context in enumerate(data.where.context_lens):
        if context == 0:
            continue
        rows = q[starts[index] : starts[index + 1]]
        k = data.k[index].float().repeat_interleave(heads.query // heads.kv, 1)
        v = data.v[index].float().repeat_interleave(heads.query // heads.kv, 1)
        position = torch.arange(context - len(rows), context)[:, None]
        key = torch.arange(context)[None, :]
        is_seen = key <= position
        if window is not None:
            is_seen &= key > position - window
        scores = torch.einsum("qhd,khd->hqk", rows, k) / math.sqrt(heads.dim)
        weights = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
        out[starts[index] : starts[index + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out.flatten(1)
