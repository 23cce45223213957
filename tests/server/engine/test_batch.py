"""A step's rows as tensors: which token, where it stands, where its KV goes, who it may see."""

import torch
from loraplex.engine.batch import Batch, DeviceMemory
from loraplex.engine.scheduler import Scheduled
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import AdapterTables

BLOCK_TOKENS = 4


def memory() -> DeviceMemory:
    cpu = torch.device("cpu")
    arena = torch.zeros(1024, dtype=torch.uint8)
    return DeviceMemory(arena, torch.bfloat16, AdapterTables(4, 1, 7, 16, cpu), BLOCK_TOKENS)


def row(
    prompt: list[int],
    output: list[int],
    blocks: list[int],
    start: int,
    num_tokens: int,
    slot: int | None = None,
) -> Scheduled:
    sequence = Sequence("r", prompt, SamplingParams(), StopParams(100), slot=slot)
    sequence.output_token_ids = output
    sequence.block_table = blocks
    return Scheduled(sequence, start, num_tokens, start + num_tokens == sequence.num_tokens)


ROWS = (
    row([10, 11, 12], [13, 14], [5, 2], 4, 1),  # decode, base
    row([20], [], [9], 0, 1, slot=1),  # a prompt of one token
    row([30, 31, 32, 33], [34], [7, 1], 4, 1, slot=1),
    row(list(range(40, 50)), [], [3, 0, 4], 3, 4, slot=1),  # a chunk from the middle
    row([50, 51, 52], [53, 54], [8, 6], 0, 5, slot=3),  # preempted before: its output anew
)


def test_a_mixed_step() -> None:
    shared = memory()
    batch = Batch.build(ROWS, shared)
    step = batch.decoder_input
    assert step.token_ids.tolist() == [14, 20, 34, 43, 44, 45, 46, 50, 51, 52, 53, 54]
    assert step.positions.tolist() == [4, 0, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert step.slot_mapping.tolist() == [8, 36, 4, 15, 0, 1, 2, 32, 33, 34, 35, 24]
    assert step.logits_rows.tolist() == [0, 1, 2, 11]  # not the chunk's
    assert batch.sampling == tuple(ROWS[index].sequence for index in (0, 1, 2, 4))

    where = step.attention
    assert where.num_decode == 3
    assert list(where.query_starts) == [0, 1, 2, 3, 7, 12]
    assert list(where.context_lens) == where.context_table.tolist() == [5, 1, 5, 7, 5]
    assert where.block_tables.tolist() == [[5, 2, 0], [9, 0, 0], [7, 1, 0], [3, 0, 4], [8, 6, 0]]
    assert where.block_tables.is_contiguous()
    assert where.block_tables.dtype == where.context_table.dtype == torch.int32

    lora = step.lora
    assert lora.segments == (Segment(1, 1, 7), Segment(3, 7, 12))
    assert lora.segment_table.tolist() == [[1, 1, 7], [3, 7, 12]]
    assert lora.segment_table.dtype == torch.int32
    assert lora.arena is shared.arena
    assert lora.tables is shared.tables


def test_a_step_without_adapters_or_samples() -> None:
    batch = Batch.build((row(list(range(9)), [], [1, 2, 3], 4, 3),), memory())
    assert batch.sampling == ()
    assert batch.decoder_input.logits_rows.shape == (0,)
    assert batch.decoder_input.logits_rows.dtype == torch.int64
    assert batch.decoder_input.lora.segments == ()
    assert batch.decoder_input.lora.segment_table.shape == (0, 3)
