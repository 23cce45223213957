"""One (stacked) linear of the decoder: NF4 base, then the rows' own LoRA updates, then the bias."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from loraplex_kernels.nf4 import BLOCK_SIZE, BaseWeight, NF4Weight
from loraplex_kernels.ops import LoraInput, Ops, Projection
from torch import Tensor


class WeightForm(Enum):
    """How the base product is computed; the numbers are those of the dequantised NF4 weight."""

    DENSE = "dense"  # from a dequantised copy: four times the memory
    PACKED = "packed"  # from the 4-bit codes: the quickest where the ops have a product for them


@dataclass(frozen=True, slots=True)
class Linear:
    """`y = c * (W x + s B A x) + b` for each of the stacked projections.

    s B A is the row's adapter's update, c its output scale: 1 but for DoRA.
    """

    weight: BaseWeight
    bias: Tensor | None  # [out], in the activations' dtype
    projections: tuple[Projection, ...]

    def __call__(self, x: Tensor, ops: Ops, lora: LoraInput, layer: int, out: Tensor) -> Tensor:
        ops.linear(x, self.weight, lora, layer, self.projections, out)
        if lora.has_output_scales:
            ops.scale_output_(out, lora, layer, self.projections)
        if self.bias is not None:
            out += self.bias
        return out

    def weights_of(self, module: int) -> Iterator[Tensor]:
        """The dequantised `[out, in]` of one of the stacked modules; nothing if it is not here."""
        for _, column, width in (p for p in self.projections if p.module == module):
            if self.weight.dense is not None:
                yield self.weight.dense[column : column + width]
            else:
                yield _rows(self.weight.nf4, column, column + width).dequantize()


def _rows(weight: NF4Weight, lo: int, hi: int) -> NF4Weight:
    blocks = weight.in_features // BLOCK_SIZE  # of one row
    return NF4Weight(weight.codes[lo:hi], weight.absmax[lo * blocks : hi * blocks], weight.code)
