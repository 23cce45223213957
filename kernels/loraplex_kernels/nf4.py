"""A weight matrix in bitsandbytes' NF4: 4-bit codes with one fp32 absmax for each 64 of them.

Format (Dettmers et al. 2023, QLoRA): uint8 `[out, in / 2]`, high nibble first, blocks of 64 along
the flattened matrix; a value is `code * absmax`. Several matrices therefore stack exactly.

bitsandbytes is imported where it is needed: it takes a second and 150 MB of torch's compiler, and a
server on a CPU that has its codes and a dense copy never calls it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

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
    def state(self) -> "QuantState":
        from loraplex_kernels.bitsandbytes import functional as bnb

        return bnb.QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )

    def dequantize(self) -> Tensor:
        """bf16 [out, in]: the values every other form of this weight is held to.

        On a CPU in torch, with bitsandbytes' bits.
        """
        if self.codes.device.type == "cpu":
            return self._dequantize_on_cpu()
        from loraplex_kernels.bitsandbytes import functional as bnb

        result: Tensor = bnb.dequantize_4bit(self.codes.view(-1, 1), self.state)
        return result

    def _dequantize_on_cpu(self) -> Tensor:
        """Both values of a byte at once, as one eight-byte element: three times as quick."""
        pairs = torch.cartesian_prod(self.code, self.code).view(torch.float64).view(-1)  # [256]
        levels = pairs.index_select(0, self.codes.view(-1).int()).view(torch.float32)
        values = levels.view(-1, BLOCK_SIZE).mul_(self.absmax[:, None])
        return values.bfloat16().view(self.out_features, self.in_features)

    def to(self, device: torch.device) -> "NF4Weight":
        return NF4Weight(self.codes.to(device), self.absmax.to(device), self.code.to(device))


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """One (stacked) linear of the base: the 4-bit weight, and a dense copy where one is kept."""

    nf4: NF4Weight
    dense: Tensor | None  # [out, in] in the activations' dtype, the values of `nf4.dequantize()`
