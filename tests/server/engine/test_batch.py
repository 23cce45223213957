"""A step's rows as tensors: which token, where it stands, where its KV goes, who it may see."""

from dataclasses import replace

import torch
from loraplex.adapters.packing import Placed
from loraplex.engine.batch import DeviceMemory, build_input
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Scheduled
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale
from loraplex_kernels.vocabulary import CutMatrix, Vocabulary, VocabularyLora

BLOCK_TOKENS = 4


def memory() -> DeviceMemory:
    cpu = torch.device("cpu")
    arena = torch.zeros(1024, dtype=torch.uint8)
    return DeviceMemory(
        arena, torch.bfloat16, GranuleForm.ROWS, AdapterTables(4, 1, 7, 16, cpu), BLOCK_TOKENS
    )


def row(
    prompt: list[int],
    output: list[int],
    blocks: list[int],
    start: int,
    num_tokens: int,
    slot: int | None = None,
    adapter_start: int = 0,
) -> Scheduled:
    sequence = Sequence(
        "r", prompt, SamplingParams(), StopParams(100), slot=slot, adapter_start=adapter_start
    )
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
    step = build_input(ROWS, shared)
    assert step.token_ids.tolist() == [14, 20, 34, 43, 44, 45, 46, 50, 51, 52, 53, 54]
    assert step.positions.tolist() == [4, 0, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert step.slot_mapping.tolist() == [8, 36, 4, 15, 0, 1, 2, 32, 33, 34, 35, 24]
    assert step.logits_rows.tolist() == [0, 1, 2, 11]  # not the chunk's

    where = step.attention
    assert where.num_decode == 3
    assert list(where.query_starts) == [0, 1, 2, 3, 7, 12]
    assert list(where.context_lens) == where.context_table.tolist() == [5, 1, 5, 7, 5]
    assert where.block_tables.tolist() == [[5, 2, 0], [9, 0, 0], [7, 1, 0], [3, 0, 4], [8, 6, 0]]
    assert where.block_tables.is_contiguous()
    assert where.block_tables.dtype == where.context_table.dtype == torch.int32

    lora = step.lora
    assert lora.segments == (Segment(1, 1, 7), Segment(3, 7, 12))
    assert lora.segment_table is not None
    assert lora.segment_table.tolist() == [[1, 1, 7], [3, 7, 12]]
    assert lora.segment_table.dtype == torch.int32
    assert lora.arena is shared.arena
    assert lora.tables is shared.tables


def test_tiles_for_ops_that_ask_for_them() -> None:
    shared = replace(memory(), with_tiles=True)
    step = build_input(
        (*ROWS, row(list(range(90)), [], list(range(10, 33)), 20, 65, slot=2)), shared
    )
    where, tiles = step.attention, step.lora.tiles
    assert where.query_start_table is not None
    assert where.query_start_table.tolist() == [0, 1, 2, 3, 7, 12, 77]
    assert where.query_tiles is not None
    assert where.query_tiles.tolist() == [
        [3, 0],
        [4, 0],
        *([5, first] for first in range(0, 65, 16)),
    ]
    assert tiles is not None
    assert tiles.short.tolist() == [[1, 1, 7], [3, 7, 12]]
    assert tiles.starts.tolist() == [0, 2, 2, 2, 2, 2]
    assert tiles.long.tolist() == [[2, 12, 76], [2, 76, 77]]
    assert step.lora.segment_table is None
    assert build_input(ROWS, memory()).lora.tiles is None


def test_a_step_without_adapters_or_samples() -> None:
    step = build_input((row(list(range(9)), [], [1, 2, 3], 4, 3),), memory())
    assert step.logits_rows.shape == (0,)
    assert step.logits_rows.dtype == torch.int64
    assert step.lora.segments == ()
    assert step.lora.segment_table is not None
    assert step.lora.segment_table.shape == (0, 3)


def test_an_activated_adapter_acts_from_its_start_on() -> None:
    prompt = list(range(60, 66))
    rows = (
        row(prompt, [70], [0, 1], 6, 1, slot=2, adapter_start=6),
        row(prompt, [70], [2, 3], 6, 1, slot=2, adapter_start=7),
        row(prompt, [], [4, 5], 1, 5, slot=2, adapter_start=4),  # a chunk that reaches over it
        row(prompt, [], [6, 7], 0, 4, slot=2, adapter_start=4),  # one that ends before it
    )
    step = build_input(rows, memory())
    assert step.lora.segments == (Segment(2, 0, 1), Segment(2, 5, 7))


def test_drafts_are_rows_behind_the_last_token_with_logits_of_their_own() -> None:
    shared = memory()
    shared.bind(2, Placed((), vocabulary=Vocabulary(head=(UPDATE,))))
    drafting = row([60, 61, 62], [63, 64, 65], [1, 6, 2], 5, 1, slot=2, adapter_start=7)
    rows = (ROWS[0], replace(drafting, num_tokens=4, drafts=(70, 71, 72)), ROWS[3])
    step = build_input(rows, shared)
    assert step.token_ids.tolist() == [14, 65, 70, 71, 72, 43, 44, 45, 46]
    assert step.positions.tolist() == [4, 5, 6, 7, 8, 3, 4, 5, 6]
    assert step.slot_mapping.tolist() == [8, 25, 26, 27, 8, 15, 0, 1, 2]
    assert step.logits_rows.tolist() == [0, 1, 2, 3, 4]
    where = step.attention
    assert where.num_decode == 1
    assert list(where.query_starts) == [0, 1, 5, 9]
    assert where.query_start_table is not None
    assert where.query_start_table.tolist() == [0, 1, 5, 9]
    assert list(where.context_lens) == [5, 9, 7]
    assert step.lora.segments == (Segment(2, 3, 5), Segment(1, 5, 9))
    assert step.vocabulary is not None
    assert step.vocabulary.segments == step.vocabulary.logits_segments == (Segment(2, 3, 5),)


WIDE, NARROW = CutMatrix(9, 2, 9, (0,)), CutMatrix(2, 4, 2, (64,))
UPDATE = VocabularyLora(WIDE, NARROW, 1.0)


def test_rows_whose_adapters_reach_into_the_vocabulary() -> None:
    shared = memory()
    shared.bind(1, Placed((), vocabulary=Vocabulary(head=(UPDATE,))))
    shared.bind(3, Placed((), vocabulary=Vocabulary(embedding=(UPDATE,))))
    activated = row([50, 51], [], [10], 0, 2, slot=1, adapter_start=2)
    rows = build_input((*ROWS, activated), shared).vocabulary
    assert rows is not None
    assert rows.segments == (Segment(1, 1, 7), Segment(3, 7, 12))
    assert rows.logits_segments == (Segment(1, 1, 3), Segment(3, 3, 4))
    assert rows.slots[1] == Vocabulary(head=(UPDATE,))
    assert rows.arena is shared.arena
    assert build_input(ROWS[:1], shared).vocabulary is None
    assert shared.eager_slots == {1, 3}


def test_a_slot_is_what_was_bound_last_and_nothing_else() -> None:
    shared = memory()
    granule = Granule(0, 2, 0, 64, 128, 0.5)
    dora = Placed((granule,), (OutputScale(0, 2, 256),))
    shared.bind(3, dora)
    assert build_input(ROWS, shared).lora.has_output_scales
    assert not build_input(ROWS[:4], shared).lora.has_output_scales
    assert shared.tables.granules(3, 0, 2) == [(64, 128, 0.5)]
    shared.bind(3, Placed((), vocabulary=Vocabulary((UPDATE,))))
    step = build_input(ROWS, shared)
    assert not step.lora.has_output_scales
    assert shared.tables.granules(3, 0, 2) == []
    assert step.vocabulary is not None
    shared.bind(3, Placed((granule,)))
    assert build_input(ROWS, shared).vocabulary is None
    assert shared.eager_slots == set()
