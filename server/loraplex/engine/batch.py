"""One step as tensors: what the decoder reads."""

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass, field

import torch
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.ops import QUERY_TILE, AttentionInput, LoraInput, LoraTiles
from loraplex_kernels.segments import NO_ADAPTER, Segment, segments_of, tiles_of
from loraplex_kernels.tables import AdapterTables
from loraplex_kernels.vocabulary import Vocabulary, VocabularyInput
from torch import Tensor

from loraplex.adapters.packing import Placed
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Scheduled
from loraplex.model.decoder import DecoderInput


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The arena's bytes and the tables that say what lies in it.

    Mutable: the contents of both, and `vocabulary`.
    """

    arena: Tensor  # uint8 [num_blocks * block_bytes]
    adapter_dtype: torch.dtype
    adapter_form: GranuleForm
    tables: AdapterTables
    block_tokens: int
    with_tiles: bool = False  # whether the ops ask for them
    vocabulary: dict[int, Vocabulary] = field(default_factory=dict)  # of the slots that have one

    def bind(self, slot: int, placed: Placed) -> None:
        """From the next step on, the slot is what lies there, and nothing else."""
        self.tables.write(slot, placed.granules, placed.output_scales)
        self.vocabulary.pop(slot, None)
        if placed.vocabulary.embedding or placed.vocabulary.head:
            self.vocabulary[slot] = placed.vocabulary

    @property
    def eager_slots(self) -> Set[int]:
        """Those whose rows need work that no CUDA graph holds."""
        return self.tables.scaled_slots | self.vocabulary.keys()


def slot_at(sequence: Sequence, position: int) -> int:
    """The slot of the row of one token; before its adapter's start (aLoRA) it has none."""
    if sequence.slot is None or position < sequence.adapter_start:
        return NO_ADAPTER
    return sequence.slot


def build_input(rows: Seq[Scheduled], memory: DeviceMemory) -> DecoderInput:
    """The rows of one step, flattened: decode rows first, each sequence's rows together."""
    device = memory.arena.device
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    last_slots: list[int] = []
    starts = [0]
    for row in rows:
        end = row.start + row.num_tokens
        token_ids += row.sequence.token_ids(row.start, end)
        token_ids += row.drafts
        positions += range(row.start, end)
        slots += _slots(row)
        starts.append(starts[-1] + row.num_tokens)
        if row.samples:
            num_logits = 1 + len(row.drafts)
            last_rows += range(starts[-1] - num_logits, starts[-1])
            last_slots += slots[-num_logits:]
    return DecoderInput(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=_slot_mapping(rows, memory.block_tokens).to(device),
        logits_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
        attention=_attention(rows, starts, memory),
        lora=_lora(slots, memory),
        vocabulary=_vocabulary(slots, last_slots, memory),
    )


def _slots(row: Scheduled) -> list[int]:
    """One entry a token."""
    first, last = row.start, row.start + row.num_tokens - 1
    slot = slot_at(row.sequence, first)
    if first == last or slot == slot_at(row.sequence, last):
        return [slot] * row.num_tokens
    return [slot_at(row.sequence, position) for position in range(first, last + 1)]


def _vocabulary(
    slots: list[int], last_slots: list[int], memory: DeviceMemory
) -> VocabularyInput | None:
    held = memory.vocabulary
    if not held or held.keys().isdisjoint(slots):
        return None
    return VocabularyInput(
        arena=memory.arena,
        dtype=memory.adapter_dtype,
        slots=held,
        segments=tuple(s for s in segments_of(slots) if s.slot in held),
        logits_segments=tuple(s for s in segments_of(last_slots) if s.slot in held),
    )


def _block_tables(rows: Seq[Scheduled]) -> Tensor:
    """int32 [num_sequences, longest table], padded with block 0."""
    width = max(len(row.sequence.block_table) for row in rows)
    tables = [
        row.sequence.block_table + [0] * (width - len(row.sequence.block_table)) for row in rows
    ]
    return torch.tensor(tables, dtype=torch.int32)


def _slot_mapping(rows: Seq[Scheduled], block_tokens: int) -> Tensor:
    """int64 [num_tokens]: where each row's KV goes, as block * block_tokens + offset."""
    mapping = [
        row.sequence.block_table[position // block_tokens] * block_tokens + position % block_tokens
        for row in rows
        for position in range(row.start, row.start + row.num_tokens)
    ]
    return torch.tensor(mapping)


def _attention(rows: Seq[Scheduled], starts: list[int], memory: DeviceMemory) -> AttentionInput:
    device = memory.arena.device
    contexts = [row.start + row.num_tokens for row in rows]
    tiles = [
        (index, first)
        for index, row in enumerate(rows)
        if row.num_tokens > 1
        for first in range(0, row.num_tokens, QUERY_TILE)
    ]
    return AttentionInput(
        num_decode=sum(1 for row in rows if row.num_tokens == 1),
        query_starts=starts,
        context_lens=contexts,
        context_table=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=_block_tables(rows).to(device),
        query_start_table=_table(starts, device),
        query_tiles=_table(tiles, device).view(-1, 2) if memory.with_tiles else None,
    )


def _lora(slots: list[int], memory: DeviceMemory) -> LoraInput:
    segments, device = segments_of(slots), memory.arena.device
    with_tiles = memory.with_tiles
    return LoraInput(
        arena=memory.arena,
        dtype=memory.adapter_dtype,
        form=memory.adapter_form,
        tables=memory.tables,
        has_adapters=bool(segments),
        has_output_scales=any(segment.slot in memory.tables.scaled_slots for segment in segments),
        segments=segments,
        segment_table=None if with_tiles else _table(segments, device).view(-1, 3),
        tiles=_tiles(segments, len(slots), device) if with_tiles else None,
    )


def _tiles(segments: Seq[Segment], num_rows: int, device: torch.device) -> LoraTiles:
    tiles = tiles_of(segments, num_rows)
    return LoraTiles(
        short=_table(tiles.short, device).view(-1, 3),
        starts=_table(tiles.starts, device),
        long=_table(tiles.long, device).view(-1, 3),
    )


def _table(values: Seq[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
