"""A weight matrix in bitsandbytes' NF4: 4-bit codes with one fp32 absmax for each 64 of them.

Format (Dettmers et al. 2023, QLoRA): uint8 `[out, in / 2]`, high nibble first, blocks of 64 along
the flattened matrix; a value is `code * absmax`. Several matrices therefore stack exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.bitsandbytes import functional as bnb

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class NF4Weight:
    """codes uint8 [out, in / 2]; absmax fp32 [out * in / 64]; code fp32 [16], NF4's levels."""

    codes: Tensor
    absmax: Tensor
    code: Tensor

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return 2 * int(self.codes.shape[1])

    @property
    def state(self) -> "bnb.QuantState":
        return bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )

    def dequantize(self) -> Tensor:
        """bf16 [out, in]: the values every other form of this weight is held to."""
        packed = self.codes.view(-1, 1)
        result: Tensor = bnb.dequantize_4bit(packed, self.state)
        return result

    def to(self, device: torch.device) -> "NF4Weight":
        return NF4Weight(self.codes.to(device), self.absmax.to(device), self.code.to(device))


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """One (stacked) linear of the base: the 4-bit weight, and a dense copy where one is kept."""

    nf4: NF4Weight
    dense: Tensor | None  # [out, in] in the activations' dtype, the values of `nf4.dequantize()`
