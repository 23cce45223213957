"""The cases of LoRA alone, of the output scale, and of the NF4 linear."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex_kernels.bitsandbytes import functional as bnb
from loraplex_kernels.cases.adapters import Adapters, Bank
from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.cases.prepared import Prepared, joined
from loraplex_kernels.cases.shapes import LinearShape
from loraplex_kernels.nf4 import BLOCK_SIZE, BaseWeight, NF4Weight
from loraplex_kernels.ops import Ops
from loraplex_kernels.segments import LONG_TILE_ROWS

CHUNK = 4096
"""Outputs whose weights are in fp32 at one time."""


class _ChangesOutput(Prepared):
    """An op that changes a linear's output y in place. `slots` is each row's."""

    def __init__(
        self, memory: Memory, linear: LinearShape, bank: Bank, slots: Sequence[int]
    ) -> None:
        self.memory = memory
        self._linear = linear
        self._slots = slots
        self._adapters = Adapters(memory, linear, bank)
        self._lora = self._adapters.lora_input(slots)
        self._before = memory.normal(len(slots), linear.out_features)
        self._y = memory.poisoned(len(slots), linear.out_features)

    def poison(self) -> None:
        self._y.copy_(self._before)

    def result(self) -> Tensor:
        return joined(self._y)


class PreparedLora(_ChangesOutput):
    def __init__(
        self, memory: Memory, linear: LinearShape, bank: Bank, slots: Sequence[int]
    ) -> None:
        super().__init__(memory, linear, bank, slots)
        self._x = memory.normal(len(slots), linear.in_features)

    def call(self, ops: Ops) -> None:
        ops.lora_(self._y, self._x, self._lora, self._adapters.layer, self._linear.projections)

    def expected(self) -> Tensor:
        return joined(self._before.float() + self._adapters.update(self._x, self._slots))


class PreparedScale(_ChangesOutput):
    def call(self, ops: Ops) -> None:
        ops.scale_output_(self._y, self._lora, self._adapters.layer, self._linear.projections)

    def expected(self) -> Tensor:
        return joined(self._adapters.scaled(self._before, self._slots))


class PreparedLinear(Prepared):
    """Random codes, with values of about unit variance in x W^T."""

    def __init__(
        self, memory: Memory, linear: LinearShape, bank: Bank, slots: Sequence[int]
    ) -> None:
        self.memory = memory
        self._linear = linear
        self._slots = slots
        self._adapters = Adapters(memory, linear, bank)
        self._lora = self._adapters.lora_input(slots)
        n, k = linear.out_features, linear.in_features
        self._weight = NF4Weight(
            memory.codes(n, k // 2),
            memory.uniform(n * k // BLOCK_SIZE, low=k**-0.5, high=3 * k**-0.5),
            bnb.get_4bit_type("nf4", device=memory.device),
        )
        self._x = memory.normal(len(slots), k)
        self._out = memory.poisoned(len(slots), n)

    def poison(self) -> None:
        self._out.fill_(torch.nan)

    def call(self, ops: Ops) -> None:
        weight = BaseWeight(self._weight, dense=None)
        layer, projections = self._adapters.layer, self._linear.projections
        ops.linear(self._x, weight, self._lora, layer, projections, self._out)

    def result(self) -> Tensor:
        return joined(self._out)

    def expected(self) -> Tensor:
        update = self._adapters.update(self._x, self._slots)
        x = self._x.float()
        for lo in range(0, update.shape[1], CHUNK):
            update[:, lo : lo + CHUNK] += x @ self._dequantized(lo, lo + CHUNK).T
        return joined(update)

    def _dequantized(self, lo: int, hi: int) -> Tensor:
        """Rows lo..hi of W as fp32, from codes that are high nibble first.

        Rounded to bf16, which is how the base is defined. But fp16 holds more than that, and the
        fused kernel, which takes so few rows, multiplies codes and absmax unrounded.
        """
        codes = self._weight.codes[lo:hi]
        nibbles = torch.stack((codes >> 4, codes & 15), dim=-1).flatten(1).int()
        blocks = self._weight.absmax.view(self._weight.out_features, -1)[lo:hi]
        values = self._weight.code[nibbles] * blocks.repeat_interleave(BLOCK_SIZE, dim=1)
        is_fused = len(self._slots) <= LONG_TILE_ROWS
        if self.memory.dtype is torch.float16 and is_fused:
            return values
        return values.bfloat16().float()
