"""The cases of attention: sequences in a paged cache that is NaN wherever no key lies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.cases.prepared import Prepared, joined
from loraplex_kernels.cases.shapes import ModelShapes
from loraplex_kernels.ops import QUERY_TILE, AttentionInput, Ops


class PreparedAttention(Prepared):
    """`sequences` are (context, queries): those of one query first; context 0 is padding."""

    def __init__(
        self,
        memory: Memory,
        shapes: ModelShapes,
        sequences: Sequence[tuple[int, int]],
        window: int | None,
    ) -> None:
        self.memory = memory
        self._shapes = shapes
        self._window = window
        kv, dim, size = shapes.num_kv_heads, shapes.head_dim, shapes.block_tokens
        num_blocks = [-(-context // size) for context, _ in sequences]
        # Of two layers, as the arena: a layer's view strides over the other's.
        self._cache = memory.poisoned(sum(num_blocks) + 1, 2, 2, kv, size, dim, in_arena=True)
        order = memory.shuffled(sum(num_blocks) + 1)
        self._blocks = [[order.pop() for _ in range(count)] for count in num_blocks]
        self._where = self._input(sequences)
        num_rows = self._where.query_starts[-1]
        self._qkv = memory.poisoned(num_rows, (shapes.num_heads + 2 * kv) * dim)
        self._out = memory.poisoned(num_rows, shapes.num_heads * dim)
        if memory.fill:
            self._fill(num_rows)

    def _input(self, sequences: Sequence[tuple[int, int]]) -> AttentionInput:
        contexts = [context for context, _ in sequences]
        queries = [count for _, count in sequences]
        starts = [sum(queries[:index]) for index in range(len(queries) + 1)]
        width = max(map(len, self._blocks)) + 1
        tables = [blocks + [0] * (width - len(blocks)) for blocks in self._blocks]
        tiles = [
            (index, first)
            for index, count in enumerate(queries)
            if count > 1
            for first in range(0, count, QUERY_TILE)
        ]
        table = self.memory.table
        return AttentionInput(
            num_decode=queries.count(1),
            query_starts=starts,
            context_lens=contexts,
            context_table=table(contexts),
            block_tables=table(tables),
            query_start_table=table(starts),
            query_tiles=table(tiles).view(-1, 2),
        )

    def _fill(self, num_rows: int) -> None:
        """Queries, and each sequence's own keys and values; the row's k and v stay NaN."""
        shapes, memory = self._shapes, self.memory
        size = shapes.block_tokens
        heads = self._qkv.view(num_rows, -1, shapes.head_dim)
        heads[:, : shapes.num_heads] = memory.normal(num_rows, shapes.num_heads, shapes.head_dim)
        for blocks, context in zip(self._blocks, self._where.context_lens, strict=True):
            token = torch.arange(context, device=memory.device)
            block = torch.tensor(blocks, dtype=torch.int64, device=memory.device)
            keys_values = memory.normal(context, 2, shapes.num_kv_heads, shapes.head_dim)
            place = block[token // size], 1, slice(None), slice(None), token % size
            self._cache[place] = keys_values

    def poison(self) -> None:
        self._out.fill_(torch.nan)

    def call(self, ops: Ops) -> None:
        k_cache, v_cache = self._cache[:, 1, 0], self._cache[:, 1, 1]
        ops.attention(self._qkv, k_cache, v_cache, self._where, self._out, self._window)

    def result(self) -> Tensor:
        return joined(self._out)

    def expected(self) -> Tensor:
        out = torch.zeros_like(self._out, dtype=torch.float32)
        starts = self._where.query_starts
        for index, context in enumerate(self._where.context_lens):
            if context:
                out[starts[index] : starts[index + 1]] = self._attended(index, context)
        return joined(out)

    def _attended(self, index: int, context: int) -> Tensor:
        """fp32 [queries, heads * dim] of one sequence."""
        shapes, starts = self._shapes, self._where.query_starts
        groups = shapes.num_heads // shapes.num_kv_heads
        cached = self._cache[self._blocks[index], 1].float().permute(0, 3, 1, 2, 4)
        k, v = cached.flatten(0, 1)[:context].repeat_interleave(groups, 2).unbind(1)
        q = self._qkv[starts[index] : starts[index + 1]].float()
        q = q.view(q.shape[0], -1, shapes.head_dim)[:, : shapes.num_heads]
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(shapes.head_dim)
        position = torch.arange(context - q.shape[0], context, device=q.device)[:, None]
        key = torch.arange(context, device=q.device)
        seen = key <= position
        if self._window is not None:
            seen &= key > position - self._window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
