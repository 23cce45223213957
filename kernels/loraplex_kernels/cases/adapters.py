"""Adapters of one stacked linear, in an arena that is NaN between them."""

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.cases.shapes import NUM_MODULES, LinearShape
from loraplex_kernels.granules import GRANULE_RANK
from loraplex_kernels.ops import LoraInput, LoraTiles, Projection
from loraplex_kernels.segments import NO_ADAPTER, pad_tiles, segments_of, tiles_of
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale, view

GAP = 256
"""Bytes of NaN between two pieces of the arena."""

Ranks = Sequence[Sequence[int]]
"""Each slot's rank at each projection; 0: the adapter does not touch it."""

Scaled = Sequence[Sequence[bool]]
"""Whether each slot scales the output of each projection; empty: no slot scales any."""


class Bank(NamedTuple):
    """What the adapters have, and how large the tables that name them are."""

    ranks: Ranks
    max_rank: int
    num_layers: int
    scaled: Scaled = ()


class Adapters:
    """A bank of adapters that touch the last `layer`, and what they do to a batch."""

    def __init__(self, memory: Memory, linear: LinearShape, bank: Bank) -> None:
        self._memory = memory
        self._linear = linear
        self.layer = bank.num_layers - 1
        widest = max(p.width for p in linear.projections)
        a_size, b_size = (
            memory.form.num_bytes(features, memory.dtype)
            for features in (linear.in_features, widest)
        )
        self._b_place = -(-a_size // GAP) * GAP
        self._piece = self._b_place + -(-b_size // GAP) * GAP + GAP  # one granule's A and B
        pieces = sum(-(-rank // GRANULE_RANK) for own in bank.ranks for rank in own)
        pieces += sum(map(sum, bank.scaled))
        self._arena = memory.poisoned(
            max(pieces, 1) * self._piece, dtype=torch.uint8, in_arena=True
        )
        self._tables = AdapterTables(
            len(bank.ranks), bank.num_layers, NUM_MODULES, bank.max_rank, memory.device
        )
        places = iter(memory.shuffled(pieces))
        scaled = bank.scaled or [()] * len(bank.ranks)
        for slot, (ranks, has_scale) in enumerate(zip(bank.ranks, scaled, strict=True)):
            self._tables.write(
                slot,
                [
                    self._granule(slot, projection, part, rank, next(places) * self._piece)
                    for projection, rank in zip(linear.projections, ranks, strict=True)
                    for part in range(-(-rank // GRANULE_RANK))
                ],
                [
                    self._output_scale(projection, next(places) * self._piece)
                    for projection in compress(linear.projections, has_scale)
                ],
            )

    def _granule(
        self, slot: int, projection: Projection, part: int, rank: int, offset: int
    ) -> Granule:
        """Place one granule; its ranks beyond `rank` are zero."""
        in_features, memory = self._linear.in_features, self._memory
        b_offset = offset + self._b_place
        if memory.fill:
            real = min(rank - part * GRANULE_RANK, GRANULE_RANK)
            a = memory.normal(real, in_features, std=in_features**-0.5)
            b = memory.normal(real, projection.width, std=rank**-0.5)
            memory.form.write_a(self._arena, offset, a)
            memory.form.write_b(self._arena, b_offset, b)
        scale = 0.5 + slot % 8 / 8
        return Granule(self.layer, projection.module, part, offset, b_offset, scale)

    def _output_scale(self, projection: Projection, offset: int) -> OutputScale:
        """Place one; it takes less than a granule does."""
        if self._memory.fill:
            target = view(self._arena, offset, 1, projection.width, torch.float32)
            target.copy_(self._memory.uniform(1, projection.width, low=0.5, high=1.5))
        return OutputScale(self.layer, projection.module, offset)

    def lora_input(self, slots: Sequence[int]) -> LoraInput:
        """The tile lists are longer than needed, as in a step that was captured."""
        segments = segments_of(slots)
        tiles = tiles_of(segments, len(slots))
        table = self._memory.table
        if tiles.long:
            short = pad_tiles(tiles.short, len(tiles.short) + 1)
            long = pad_tiles(tiles.long, len(tiles.long) + 1)
        else:
            short, long = pad_tiles(tiles.short, len(slots)), []
        return LoraInput(
            arena=self._arena,
            dtype=self._memory.dtype,
            form=self._memory.form,
            tables=self._tables,
            has_adapters=bool(segments),
            has_output_scales=not self._tables.scaled_slots.isdisjoint(slots),
            segments=segments,
            segment_table=table(segments).view(-1, 3),
            tiles=LoraTiles(
                short=table(short).view(-1, 3),
                starts=table(tiles.starts),
                long=table(long).view(-1, 3),
            ),
        )

    def update(self, x: Tensor, slots: Sequence[int]) -> Tensor:
        """fp32 [rows, out]: sum of `scale * B (A x)` of each row's adapter."""
        form, dtype = self._memory.form, self._memory.dtype
        result = torch.zeros(x.shape[0], self._linear.out_features, device=x.device)
        for slot, lo, hi in segments_of(slots):
            for module, column, width in self._linear.projections:
                for a, b, scale in self._tables.granules(slot, self.layer, module):
                    a_weight = form.read_a(self._arena, a, x.shape[1], dtype)
                    b_weight = form.read_b(self._arena, b, width, dtype)
                    v = x[lo:hi].float() @ a_weight.T.float()
                    result[lo:hi, column : column + width] += scale * (v @ b_weight.float())
        return result

    def scaled(self, y: Tensor, slots: Sequence[int]) -> Tensor:
        """fp32, y with the columns multiplied that each row's adapter has a scale for."""
        result = y.float()
        for slot, lo, hi in segments_of(slots):
            offsets = self._tables.output_scale[slot, self.layer].tolist()
            for module, column, width in self._linear.projections:
                if offsets[module] >= 0:
                    factor = view(self._arena, offsets[module], 1, width, torch.float32)
                    result[lo:hi, column : column + width] *= factor
        return result


def adapter_bytes(linear: LinearShape, ranks: Ranks, slots: Sequence[int], itemsize: int) -> int:
    """Weights of the adapters that rows name, at their real ranks, each once."""
    return itemsize * sum(
        rank * (linear.in_features + projection.width)
        for slot in {*slots} - {NO_ADAPTER}
        for projection, rank in zip(linear.projections, ranks[slot], strict=True)
    )
