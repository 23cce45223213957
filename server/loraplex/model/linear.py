"""One (stacked) linear of the decoder: NF4 base, then the rows' own LoRA updates, then the bias."""

from dataclasses import dataclass
from enum import Enum

from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import LoraInput, Ops, Projection
from torch import Tensor


class WeightForm(Enum):
    """How the base product is computed; the numbers are those of the dequantised NF4 weight."""

    DENSE = "dense"  # from a dequantised copy: the quickest on a CPU, four times the memory
    PACKED = "packed"  # from the 4-bit codes


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = W x + sum of the row's adapter's s B A x + b` for each of the stacked projections."""

    weight: BaseWeight
    bias: Tensor | None  # [out], in the activations' dtype
    projections: tuple[Projection, ...]

    def __call__(self, x: Tensor, ops: Ops, lora: LoraInput, layer: int, out: Tensor) -> Tensor:
        ops.linear(x, self.weight, lora, layer, self.projections, out)
        if self.bias is not None:
            out += self.bias
        return out
