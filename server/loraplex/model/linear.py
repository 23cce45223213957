"""One (stacked) linear of the decoder: NF4 base, then the rows' own LoRA updates, then the bias."""

from enum import Enum

import torch
import torch.nn.functional as F
from loraplex_kernels.ops import LoraInput, Ops, Projection
from torch import Tensor

from loraplex.model.bitsandbytes import matmul_4bit
from loraplex.model.nf4 import NF4Weight


class WeightForm(Enum):
    """How the base product is computed; the numbers are those of the dequantised NF4 weight."""

    DENSE = "dense"  # from a dequantised copy: the quickest on a CPU, four times the memory
    PACKED = "packed"  # from the 4-bit codes, through bitsandbytes


class Linear:
    """`y = W x + sum of the row's adapter's s B A x + b` for each of the stacked projections."""

    def __init__(
        self,
        weight: NF4Weight,
        bias: Tensor | None,
        projections: tuple[Projection, ...],
        form: WeightForm,
        dtype: torch.dtype,
    ) -> None:
        self.weight = weight
        self.projections = projections
        self._bias = None if bias is None else bias.to(dtype)
        self._state = weight.state
        self._dense = weight.dequantize().to(dtype) if form is WeightForm.DENSE else None

    def __call__(self, x: Tensor, ops: Ops, lora: LoraInput, layer: int) -> Tensor:
        y = self._base(x)
        if lora.segments:
            ops.lora_(y, x, lora, layer, self.projections)
        if self._bias is not None:
            y += self._bias
        return y

    def _base(self, x: Tensor) -> Tensor:
        if self._dense is not None:
            return F.linear(x, self._dense)
        if x.dtype != torch.bfloat16:  # bitsandbytes would not round the weight to bf16
            return F.linear(x, self.weight.dequantize().to(x.dtype))
        y: Tensor = matmul_4bit(x, self.weight.codes.view(-1, 1), self._state)
        return y
