"""Where every resident adapter's weights lie in the arena."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.granules import GRANULE_RANK


class Granule(NamedTuple):
    """16 ranks of one module of one layer: `a` and `b` are byte offsets in the arena.

    There lie A [16, K] and B^T [16, N], in a `GranuleForm`.
    """

    layer: int
    module: int
    part: int  # which 16 ranks of this module
    a: int
    b: int
    scale: float  # alpha / r or alpha / sqrt(r)


class OutputScale(NamedTuple):
    """What one module's output is multiplied by."""

    layer: int
    module: int
    offset: int  # fp32 [N], in bytes from the arena's start; a multiple of 64


class AdapterTables:
    """Fixed-size device tables, a row a slot. Written between steps, read by every LoRA op.

    offset       int64 [slots, layers, modules, granules, 2]   bytes from the arena's start: A, B^T
    scale        fp32  [slots, layers, modules, granules]
    num_granules int32 [slots, layers, modules]                0: this module is not adapted
    output_scale int64 [slots, layers, modules]                bytes; -1: the output is not scaled

    `scaled_slots` on the host: those with any output scale.
    """

    def __init__(
        self, num_slots: int, num_layers: int, num_modules: int, max_rank: int, device: torch.device
    ) -> None:
        granules = -(-max_rank // GRANULE_RANK)
        shape = (num_slots, num_layers, num_modules)
        self.offset = torch.zeros(*shape, granules, 2, dtype=torch.int64, device=device)
        self.scale = torch.zeros(*shape, granules, dtype=torch.float32, device=device)
        self.num_granules = torch.zeros(*shape, dtype=torch.int32, device=device)
        self.output_scale = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.scaled_slots: set[int] = set()

    def write(
        self, slot: int, granules: Iterable[Granule], output_scales: Sequence[OutputScale] = ()
    ) -> None:
        """Make `slot` describe these and nothing else."""
        listed = list(granules)
        offset = torch.zeros_like(self.offset[slot], device="cpu")
        scale = torch.zeros_like(self.scale[slot], device="cpu")
        count = torch.zeros_like(self.num_granules[slot], device="cpu")
        if listed:
            places = torch.tensor([(g.layer, g.module, g.part) for g in listed]).T
            offset[tuple(places)] = torch.tensor([(g.a, g.b) for g in listed])
            scale[tuple(places)] = torch.tensor([g.scale for g in listed])
            layer, module, part = places
            entries = layer * count.shape[1] + module
            count.view(-1).scatter_reduce_(0, entries, (part + 1).int(), "amax")
        self.offset[slot].copy_(offset)
        self.scale[slot].copy_(scale)
        self.num_granules[slot].copy_(count)
        self._write_output_scales(slot, output_scales)

    def _write_output_scales(self, slot: int, output_scales: Sequence[OutputScale]) -> None:
        if not output_scales and slot not in self.scaled_slots:
            return
        offsets = torch.full_like(self.output_scale[slot], -1, device="cpu")
        if output_scales:
            layers, modules, places = torch.tensor(output_scales).T
            offsets[layers, modules] = places
            self.scaled_slots.add(slot)
        else:
            self.scaled_slots.discard(slot)
        self.output_scale[slot].copy_(offsets)

    def granules(self, slot: int, layer: int, module: int) -> list[tuple[int, int, float]]:
        """`(a, b, scale)` of each granule of one module, for the reference ops and tests."""
        count = int(self.num_granules[slot, layer, module])
        offsets = self.offset[slot, layer, module, :count].tolist()
        scales = self.scale[slot, layer, module, :count].tolist()
        return [(a, b, s) for (a, b), s in zip(offsets, scales, strict=True)]


def view(arena: Tensor, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A `[rows, columns]` matrix of `dtype` that starts `offset` bytes into the arena."""
    size = rows * columns * dtype.itemsize
    return arena[offset : offset + size].view(dtype).view(rows, columns)
