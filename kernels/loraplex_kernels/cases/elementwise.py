"""The cases of RMSNorm, rotary with the KV write, and SiLU-mul."""

import torch
from torch import Tensor

from loraplex_kernels.cases.memory import POISON, Memory
from loraplex_kernels.cases.prepared import Prepared, joined
from loraplex_kernels.cases.shapes import ModelShapes
from loraplex_kernels.ops import Ops

EPS = 1e-5


class PreparedNorm(Prepared):
    def __init__(self, memory: Memory, hidden_size: int, num_rows: int, has_delta: bool) -> None:
        self.memory = memory
        self._before = memory.normal(num_rows, hidden_size, dtype=torch.float32)
        self._residual = memory.poisoned(num_rows, hidden_size, dtype=torch.float32)
        self._delta = memory.normal(num_rows, hidden_size) if has_delta else None
        self._weight = memory.normal(hidden_size, dtype=torch.float32)
        self._out = memory.poisoned(num_rows, hidden_size)

    def poison(self) -> None:
        self._residual.copy_(self._before)
        self._out.fill_(torch.nan)

    def call(self, ops: Ops) -> None:
        ops.add_rms_norm(self._residual, self._delta, self._weight, EPS, self._out)

    def result(self) -> Tensor:
        return joined(self._residual, self._out)

    def expected(self) -> Tensor:
        x = self._before if self._delta is None else self._before + self._delta.float()
        return joined(x, x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self._weight)


class PreparedRotary(Prepared):
    """Rows of many sequences in shuffled places of the cache; the last row but one is padding."""

    def __init__(self, memory: Memory, shapes: ModelShapes, num_rows: int) -> None:
        self.memory = memory
        self._heads = shapes.num_heads
        self._kv_heads = kv = shapes.num_kv_heads
        self._dim = dim = shapes.head_dim
        self._block_tokens = size = shapes.block_tokens
        self._before = memory.normal(num_rows, (self._heads + 2 * kv) * dim)
        self._qkv = memory.poisoned(*self._before.shape)
        self._cos = memory.uniform(num_rows, dim // 2, low=-1.0, high=1.0)
        self._sin = memory.uniform(num_rows, dim // 2, low=-1.0, high=1.0)
        num_blocks = -(-num_rows // size) + 2
        # Of two layers.
        self._cache = memory.poisoned(num_blocks, 2, 2, kv, size, dim, in_arena=True)
        places = memory.shuffled(num_blocks * size)[:num_rows]
        if num_rows > 1:
            places[-2] = -1
        self._slot_mapping = memory.table(places, torch.int64)

    @property
    def _written(self) -> Tensor:
        """The new keys and values [rows, 2, kv_heads, dim]."""
        return self._cache[self._places()]

    def _places(self) -> tuple[Tensor | int | slice, ...]:
        where = self._slot_mapping[self._slot_mapping >= 0]
        block, offset = where // self._block_tokens, where % self._block_tokens
        return block, 1, slice(None), slice(None), offset

    def poison(self) -> None:
        self._qkv.copy_(self._before)
        self._cache.view(torch.uint8).fill_(POISON)

    def call(self, ops: Ops) -> None:
        k_cache, v_cache = self._cache[:, 1, 0], self._cache[:, 1, 1]
        ops.rotary_and_cache(self._qkv, self._cos, self._sin, k_cache, v_cache, self._slot_mapping)

    def result(self) -> Tensor:
        return joined(self._qkv, self._written)

    def expected(self) -> Tensor:
        heads = self._before.float().view(self._before.shape[0], -1, self._dim)
        turning, v = heads[:, : -self._kv_heads], heads[:, -self._kv_heads :]
        low, high = turning.chunk(2, dim=-1)
        cos, sin = self._cos[:, None], self._sin[:, None]
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        written = torch.stack((turned[:, self._heads :], v), dim=1)[self._slot_mapping >= 0]
        return joined(torch.cat((turned, v), dim=1), written)

    def is_intact(self) -> bool:
        """Nothing in the cache but the new keys and values either."""
        rest = self._cache.clone()
        rest.view(torch.uint8)[self._places()] = POISON
        return super().is_intact() and bool((rest.view(torch.uint8) == POISON).all())


class PreparedSilu(Prepared):
    def __init__(self, memory: Memory, intermediate_size: int, num_rows: int) -> None:
        self.memory = memory
        self._gate_up = memory.normal(num_rows, 2 * intermediate_size)
        self._out = memory.poisoned(num_rows, intermediate_size)

    def poison(self) -> None:
        self._out.fill_(torch.nan)

    def call(self, ops: Ops) -> None:
        ops.silu_mul(self._gate_up, self._out)

    def result(self) -> Tensor:
        return joined(self._out)

    def expected(self) -> Tensor:
        gate, up = self._gate_up.float().chunk(2, dim=-1)
        return joined(gate / (1 + (-gate).exp()) * up)
