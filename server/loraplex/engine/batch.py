"""One step as tensors: what the decoder and the sampler read."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from loraplex_kernels.ops import AttentionInput, LoraInput
from loraplex_kernels.segments import NO_ADAPTER, segments_of
from loraplex_kernels.tables import AdapterTables
from torch import Tensor

from loraplex.engine.scheduler import Scheduled
from loraplex.engine.sequence import Sequence
from loraplex.model.decoder import DecoderInput


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The arena's bytes and the tables that say what lies in it."""

    arena: Tensor  # uint8 [num_blocks * block_bytes]
    adapter_dtype: torch.dtype
    tables: AdapterTables
    block_tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, flattened: decode rows first, each sequence's rows together."""

    decoder_input: DecoderInput
    sampling: tuple[Sequence, ...]  # parallel to the decoder's logits

    @classmethod
    def build(cls, rows: Seq[Scheduled], memory: DeviceMemory) -> "Batch":
        device = memory.arena.device
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        starts = [0]
        for row in rows:
            end = row.start + row.num_tokens
            token_ids += row.sequence.token_ids(row.start, end)
            positions += range(row.start, end)
            slot = row.sequence.slot
            slots += [NO_ADAPTER if slot is None else slot] * row.num_tokens
            starts.append(starts[-1] + row.num_tokens)
            if row.samples:
                last_rows.append(starts[-1] - 1)
        tables = _block_tables(rows)
        return cls(
            DecoderInput(
                token_ids=torch.tensor(token_ids, device=device),
                positions=torch.tensor(positions, device=device),
                slot_mapping=_slot_mapping(rows, memory.block_tokens).to(device),
                logits_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
                attention=_attention(rows, starts, tables.to(device)),
                lora=_lora(slots, memory),
            ),
            tuple(row.sequence for row in rows if row.samples),
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


def _attention(rows: Seq[Scheduled], starts: list[int], tables: Tensor) -> AttentionInput:
    contexts = [row.start + row.num_tokens for row in rows]
    return AttentionInput(
        num_decode=sum(1 for row in rows if row.num_tokens == 1),
        query_starts=starts,
        context_lens=contexts,
        context_table=torch.tensor(contexts, dtype=torch.int32, device=tables.device),
        block_tables=tables,
    )


def _lora(slots: list[int], memory: DeviceMemory) -> LoraInput:
    segments = segments_of(slots)
    table = torch.tensor(segments, dtype=torch.int32, device=memory.arena.device).view(-1, 3)
    return LoraInput(memory.arena, memory.adapter_dtype, memory.tables, segments, table)
