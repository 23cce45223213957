"""Which graph a step runs in, and what it finds in the memory that all graphs read."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraplex.engine.batch import DeviceMemory
from loraplex.engine.graphs import (
    Captured,
    DecodeGraphs,
    DecodeInputs,
    Graph,
    decode_tiles,
    ladder,
)
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Scheduled
from loraplex.model.decoder import DecoderInput
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.segments import NO_ADAPTER, TILE_ROWS
from loraplex_kernels.tables import AdapterTables, OutputScale
from torch import Tensor

from tests.server.engine.lazy_streams import LazyCopyStream, LazyDevice, LazyStream
from tests.server.engine.recorded_graphs import Recorder

CPU = torch.device("cpu")
BLOCK_TOKENS = 4
MAX_ROWS = 20
MAX_BLOCKS = 5
VOCAB = 6 + MAX_BLOCKS


def row(
    blocks: list[int], start: int, slot: int | None = None, token: int = 0, samples: bool = True
) -> Scheduled:
    """One token of a sequence; without `samples` its prompt goes on."""
    prompt = [1] * start + [token] + [1] * (not samples)
    sequence = Sequence("r", prompt, SamplingParams(), StopParams(9), slot=slot)
    sequence.block_table = blocks
    return Scheduled(sequence, start, 1, samples)


@dataclass(frozen=True)
class _Queued:
    """A graph whose replay waits in a stream like any other work."""

    graph: Graph
    stream: LazyStream

    def replay(self) -> None:
        self.stream.give(self.graph.replay)


@dataclass
class FakeDevice:
    """A decoder whose logits say what each row was given, on a device that is late.

    `seen` has the logits of all rows of every replay.
    """

    chance: list[int] | None = None
    seen: list[Tensor] = field(default_factory=list)
    failing: dict[int, Exception] = field(default_factory=dict)
    size_bytes: int = 1
    captured: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.streams = LazyDevice(self.chance)
        self.compute = self.streams.stream()
        self._recorder = Recorder(lambda kernel, grid, *args: kernel(*args))
        self._logits = torch.empty(MAX_ROWS, VOCAB)

    @property
    def num_bytes(self) -> int:
        return self.size_bytes * len(self.captured)

    def capture(self, region: Callable[[], Tensor]) -> Captured:
        captured = self._recorder.capture(region)
        size = len(captured.logits)
        if size in self.failing:
            raise self.failing[size]
        self.captured.append(size)
        self.streams.synchronize()
        return Captured(_Queued(captured.graph, self.compute), captured.logits)

    def forward(self, step: DecoderInput) -> Tensor:
        logits = self._logits[: len(step.logits_rows)]
        assert step.lora.tiles is not None
        columns = (step.token_ids, step.positions, step.slot_mapping)
        self._recorder.launch(_copy_columns, (1,), logits, *columns)
        self._recorder.launch(_copy_where, (1,), logits, step.attention.context_table)
        self._recorder.launch(_copy_tables, (1,), logits, step.attention.block_tables)
        self._recorder.launch(_copy_slots, (1,), logits, step.lora.tiles.short)
        self._recorder.launch(self._log, (1,), logits, step.lora.tiles.starts)
        return logits

    def _log(self, logits: Tensor, starts: Tensor) -> None:
        slots = logits[:, 4]
        for group, (lo, hi) in enumerate(pairwise(starts.tolist())):
            rows = slots[TILE_ROWS * group : TILE_ROWS * (group + 1)].tolist()
            assert (hi > lo) == any(slot != NO_ADAPTER for slot in rows)
        self.seen.append(logits.clone())


def _copy_columns(logits: Tensor, *columns: Tensor) -> None:
    for index, column in enumerate(columns):
        logits[:, index] = column


def _copy_where(logits: Tensor, contexts: Tensor) -> None:
    logits[:, 3] = contexts


def _copy_slots(logits: Tensor, tiles: Tensor) -> None:
    logits[:, 4] = NO_ADAPTER
    for slot, lo, hi in tiles.tolist():
        if slot != NO_ADAPTER:
            assert (logits[lo:hi, 4] == NO_ADAPTER).all(), "a row in two tiles"
            logits[lo:hi, 4] = slot


def _copy_tables(logits: Tensor, tables: Tensor) -> None:
    """As far as a kernel may look, by the contexts."""
    used = -(-logits[:, 3:4] // BLOCK_TOKENS)
    logits[:, 6:] = tables.where(torch.arange(MAX_BLOCKS) < used, -1)
    logits[:, 5] = 0


def inputs_of(
    device: FakeDevice, max_rows: int = MAX_ROWS, tables: AdapterTables | None = None
) -> DecodeInputs:
    arena = torch.zeros(64, dtype=torch.uint8)
    tables = tables or AdapterTables(2, 1, 7, 16, CPU)
    memory = DeviceMemory(arena, torch.float32, GranuleForm.ROWS, tables, BLOCK_TOKENS)
    stream = LazyCopyStream(device.compute, device.compute)
    return DecodeInputs(memory, max_rows, MAX_BLOCKS, stream)


def graphs_of(device: FakeDevice, max_rows: int = MAX_ROWS) -> DecodeGraphs:
    graphs = DecodeGraphs.capture(device.forward, inputs_of(device, max_rows), device)
    device.streams.synchronize()
    device.seen.clear()
    return graphs


def expected(rows: Seq[Scheduled], size: int) -> list[list[int]]:
    """What `FakeDevice.forward` writes for these rows in a graph of `size`."""
    result = []
    for scheduled in rows:
        sequence, start = scheduled.sequence, scheduled.start
        used = start // BLOCK_TOKENS + 1
        table = sequence.block_table[:used] + [-1] * (MAX_BLOCKS - used)
        place = table[start // BLOCK_TOKENS] * BLOCK_TOKENS + start % BLOCK_TOKENS
        slot = NO_ADAPTER if sequence.slot is None else sequence.slot
        token = sequence.prompt_token_ids[start]
        result.append([token, start, place, start + 1, slot, 0, *table])
    padding = [0, 0, -1, 0, NO_ADAPTER, 0, *[-1] * MAX_BLOCKS]
    return result + [padding] * (size - len(rows))


def test_the_ladder() -> None:
    assert ladder(1) == (1,)
    assert ladder(4) == (1, 2, 4)
    assert ladder(20) == (1, 2, 4, 8, 16, 20)
    assert ladder(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert ladder(100)[-4:] == (64, 80, 96, 100)
    assert ladder(256)[-3:] == (224, 240, 256)


SLOTS = st.lists(st.integers(NO_ADAPTER, 3), max_size=200).map(sorted)


@given(slots=SLOTS, spare=st.integers(0, 20))
@example(slots=[0] * 5 + [1] * 150, spare=0)
def test_every_row_with_an_adapter_is_in_one_short_tile(slots: list[int], spare: int) -> None:
    """Also where a segment is so long that tiles_of would make long ones."""
    num_rows = max(1, len(slots) + spare)
    tiles = decode_tiles(slots, num_rows)
    assert tiles.long == []
    assert len(tiles.short) <= len(slots)
    found = [NO_ADAPTER] * len(slots)
    for index, (slot, lo, hi) in enumerate(tiles.short):
        assert found[lo:hi] == [NO_ADAPTER] * (hi - lo)
        assert lo // TILE_ROWS == (hi - 1) // TILE_ROWS
        group = lo // TILE_ROWS
        assert tiles.starts[group] <= index < tiles.starts[group + 1]
        found[lo:hi] = [slot] * (hi - lo)
    assert found == slots
    assert len(tiles.starts) == -(-num_rows // TILE_ROWS) + 1


@st.composite
def steps(draw: st.DrawFn) -> list[list[Scheduled]]:
    """Sequences that come, go, change places and grow."""
    tables = st.lists(st.integers(0, 99), min_size=MAX_BLOCKS, max_size=MAX_BLOCKS)
    known = draw(st.lists(tables, min_size=1, max_size=4))
    one = st.builds(
        lambda table, start, slot, token: row(
            table[: start // BLOCK_TOKENS + 1], start, slot, token
        ),
        st.sampled_from(known),
        st.integers(0, MAX_BLOCKS * BLOCK_TOKENS - 1),
        st.none() | st.integers(0, 1),
        st.integers(0, 99),
    )
    ordered = st.lists(one, min_size=1, max_size=MAX_ROWS).map(
        lambda rows: sorted(rows, key=lambda r: -1 if r.sequence.slot is None else r.sequence.slot)
    )
    return draw(st.lists(ordered, min_size=1, max_size=5))


@settings(max_examples=40, deadline=None)
@given(chance=st.lists(st.integers(0, 2), max_size=5), steps=steps())
def test_each_replay_finds_its_own_step(chance: list[int], steps: list[list[Scheduled]]) -> None:
    """Though nobody waits between them, as after steps in which no row samples."""
    device = FakeDevice(chance)
    graphs = graphs_of(device)
    for rows in steps:
        logits = graphs.run(rows)
        assert logits is not None
        assert len(logits) == len(rows)
    device.streams.synchronize()
    assert len(device.seen) == len(steps)
    for rows, seen in zip(steps, device.seen, strict=True):
        assert len(seen) == min(size for size in graphs.sizes if size >= len(rows))
        assert seen.tolist() == expected(rows, len(seen))


def test_a_table_that_grows_where_it_is() -> None:
    """As the scheduler's do."""
    device = FakeDevice()
    graphs = graphs_of(device)
    growing, still = row([3], 2), row([9, 8], 5)
    for start in (2, 3, 4, 15, 16):
        growing.sequence.block_table += range(len(growing.sequence.block_table), start // 4 + 1)
        rows = [replace(growing, start=start), still]
        growing.sequence.prompt_token_ids = [1] * (start + 1)
        graphs.run(rows)
        device.streams.synchronize()
        assert device.seen[-1].tolist() == expected(rows, 2)


def test_logits_are_of_the_rows_that_sample() -> None:
    device = FakeDevice()
    graphs = graphs_of(device)
    rows = [row([3, 1], 5, token=7), row([2], 0, token=8, samples=False), row([4], 2, 1, token=9)]
    graphs.run(rows)
    device.streams.synchronize()
    chosen = graphs.run(rows)  # picked from what the replay before this one left
    assert chosen is not None
    assert chosen.tolist() == [expected(rows, 3)[index] for index in (0, 2)]
    none = graphs.run(rows[1:2])
    assert none is not None
    assert none.shape == (0, VOCAB)


def test_other_steps_are_left_to_the_caller() -> None:
    device = FakeDevice()
    graphs = graphs_of(device, max_rows=4)
    chunk = Scheduled(row([1, 2], 5).sequence, 0, 6, True)
    assert graphs.run([row([3], 0), chunk]) is None
    assert graphs.run([row([3], 0)] * 5) is None
    assert graphs.run([row([3], 0)] * 4) is not None


def test_a_row_whose_adapter_scales_outputs_makes_its_step_eager() -> None:
    """The others go on, and so do its slot's rows once another adapter has the slot."""
    device, tables = FakeDevice(), AdapterTables(2, 1, 7, 16, CPU)
    graphs = DecodeGraphs.capture(device.forward, inputs_of(device, tables=tables), device)
    mixed, others = [row([3], 0), row([1], 0, slot=1)], [row([3], 0), row([2], 0, slot=0)]
    tables.write(1, [], [OutputScale(0, 6, 0)])
    assert graphs.run(mixed) is None
    assert graphs.run(others) is not None
    tables.write(1, [])
    assert graphs.run(mixed) is not None


def test_a_row_before_its_adapters_start_has_no_adapter() -> None:
    """A prompt's chunk of one token, of an adapter that acts from an invocation on."""
    device = FakeDevice()
    graphs = graphs_of(device)
    chunk = row([3, 1], 5, slot=1, samples=False)
    for adapter_start, slot in ((6, NO_ADAPTER), (5, 1)):
        chunk.sequence.adapter_start = adapter_start
        graphs.run([chunk])
        device.streams.synchronize()
        assert device.seen[-1][0, 4] == slot


def test_what_is_padding_at_first_is_all_of_it() -> None:
    """Warm-up and capture run on it: they write nothing into the arena, and read nothing there."""
    device = FakeDevice()
    graphs = DecodeGraphs.capture(device.forward, inputs_of(device), device)
    device.seen.clear()
    device.streams.synchronize()
    graphs._graphs[8].graph.replay()
    device.streams.synchronize()
    assert device.seen[0].tolist() == expected([], 8)


def test_the_largest_is_captured_first() -> None:
    device = FakeDevice()
    calls: list[tuple[int, int]] = []
    DecodeGraphs.capture(
        device.forward, inputs_of(device), device, lambda done, total: calls.append((done, total))
    )
    assert device.captured == [20, 16, 8, 4, 2, 1]
    assert calls == [(done, 6) for done in range(7)]


def test_a_size_that_does_not_fit_runs_in_a_larger_graph_or_eagerly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FakeDevice(
        failing={20: torch.OutOfMemoryError("full"), 4: torch.OutOfMemoryError("full")}
    )
    graphs = graphs_of(device)
    assert graphs.sizes == (1, 2, 8, 16)
    assert graphs.run([row([1], 0)] * 17) is None
    assert graphs.run([row([1], 0)] * 3) is not None
    device.streams.synchronize()
    assert len(device.seen[0]) == 8
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "no CUDA graph for 20 rows: out of memory",
        "no CUDA graph for 4 rows: out of memory",
    ]


def test_a_capture_that_breaks_ends_capturing_and_not_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FakeDevice(failing={8: RuntimeError("operation not permitted while capturing")})
    graphs = graphs_of(device)
    assert graphs.sizes == (16, 20)
    assert graphs.run([row([1], 0)]) is not None
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "no CUDA graphs for 8 rows or fewer"
    ]
    assert "not permitted" in caplog.text


def test_graphs_hold_a_bounded_part_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    device = FakeDevice(size_bytes=1 << 20)
    graphs = DecodeGraphs.capture(
        device.forward, inputs_of(device), device, max_bytes=(2 << 20) + 1
    )
    assert graphs.sizes == (8, 16, 20)
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graphs for 4 rows or fewer: out of their memory",
        "CUDA graphs for 8, 16, 20 rows hold 3.0 MiB",
    ]
