"""CUDA graphs for the steps in which every sequence runs one token.

Such a step is the same launches every time, on other contents. They are captured at start for a
ladder of sizes, and a step replays the smallest graph that holds its rows; the rows left over are
padding: slot_mapping -1, context 0, in no tile. One graph serves any mix of adapters, none
included, as grids and scalars come from sizes alone and everything else lies in fixed memory.
Only an adapter that needs more than granules, as DoRA does its output scale, makes every step that
has a row of it an eager one: else all steps would pay for launches that few have a use for.
"""

import logging
import math
from collections.abc import Callable, Mapping, Set
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from loraplex_kernels.ops import AttentionInput, LoraInput, LoraTiles
from loraplex_kernels.segments import (
    LONG_TILE_ROWS,
    TILE_ROWS,
    Segment,
    Tiles,
    pad_tiles,
    segments_of,
    tiles_of,
)
from torch import Tensor

from loraplex.config import format_size
from loraplex.engine.batch import DeviceMemory, slot_at
from loraplex.engine.step import Scheduled
from loraplex.engine.transfer import CopyStream, CudaCopyStream, Event
from loraplex.model.decoder import DecoderInput
from loraplex.model.loader import Progress

log = logging.getLogger(__name__)

MAX_BYTES = 512 << 20
"""No further graph is captured once they hold more; so much is left free for them."""

ALIGNMENT = 64  # bytes; kernels are compiled for pointers that 16 divides

Forward = Callable[[DecoderInput], Tensor]
"""Device work alone: nothing allocated, nothing read back, the logits always in the same memory."""


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Queue them all on the compute stream."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and where each replay leaves its logits, fp32 [size, vocab]."""

    graph: Graph
    logits: Tensor


class Capturer(Protocol):
    """Makes graphs that share one pool of memory, as only one of them runs at a time."""

    def capture(self, region: Callable[[], Tensor]) -> Captured:
        """Run the region once, then record it.

        Raises torch.OutOfMemoryError when a smaller region may still do, anything else when the
        device is in no state to record another.
        """

    @property
    def num_bytes(self) -> int:
        """Device memory that the graphs hold."""


def ladder(max_rows: int) -> tuple[int, ...]:
    """Sizes with a graph of their own, ascending; the last one holds `max_rows`."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16))
    return (*(size for size in sizes if size < max_rows), max_rows)


def decode_tiles(slots: Seq[int], max_rows: int) -> Tiles:
    """Short tiles alone: a list of long ones would need launches that most steps have no use for.

    At most one tile a row; `starts` reach to `max_rows`.
    """
    cut = (
        Segment(segment.slot, lo, min(lo + LONG_TILE_ROWS, segment.hi))
        for segment in segments_of(slots)
        for lo in range(segment.lo, segment.hi, LONG_TILE_ROWS)
    )
    return tiles_of(cut, max_rows)


@dataclass(frozen=True, slots=True)
class _Fields:
    """What a step of R rows reads, as views of one stretch of memory; the first rows come first."""

    token_ids: Tensor  # int64 [R]
    positions: Tensor  # int64 [R]
    slot_mapping: Tensor  # int64 [R]
    contexts: Tensor  # int32 [R]
    tiles: Tensor  # int32 [R, 3]
    tile_starts: Tensor  # int32 [ceil(R / TILE_ROWS) + 1]
    block_tables: Tensor  # int32 [R, max_blocks]


Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def _shapes(max_rows: int, max_blocks: int) -> Shapes:
    """In the order of `_Fields`, whose last one is by far the largest and rarely changes."""
    num_starts = -(-max_rows // TILE_ROWS) + 1
    return {
        "token_ids": ((max_rows,), torch.int64),
        "positions": ((max_rows,), torch.int64),
        "slot_mapping": ((max_rows,), torch.int64),
        "contexts": ((max_rows,), torch.int32),
        "tiles": ((max_rows, 3), torch.int32),
        "tile_starts": ((num_starts,), torch.int32),
        "block_tables": ((max_rows, max_blocks), torch.int32),
    }


def _cut(memory: Tensor, shapes: Shapes) -> _Fields:
    pieces, place = {}, 0
    for name, (shape, dtype) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        pieces[name] = memory[place : place + size].view(dtype).view(shape)
        place += _aligned(size)
    return _Fields(**pieces)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class DecodeInputs:
    """The memory that all graphs read, and its image on the host, from which it is filled.

    Mutable: the contents of both, `_tables`, the block tables that lie there, and `_left`, the
    event after which the image may be written again.
    """

    def __init__(
        self, memory: DeviceMemory, max_rows: int, max_blocks: int, stream: CopyStream
    ) -> None:
        self.max_rows = max_rows
        self._memory = memory
        self._stream = stream
        self._left: Event | None = None
        self._tables: list[list[int]] = [[] for _ in range(max_rows)]
        shapes = _shapes(max_rows, max_blocks)
        sizes = [_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes.values()]
        image = stream.pinned(sum(sizes))
        device = torch.empty(sum(sizes), dtype=torch.uint8, device=memory.arena.device)
        self._image, self._fields = _cut(image, shapes), _cut(device, shapes)
        self._image_head, self._head = image[: sum(sizes[:-1])], device[: sum(sizes[:-1])]
        self._rows = torch.arange(max_rows + 1, device=device.device)
        self._starts = self._rows.int()
        self._nothing = torch.empty(0, dtype=torch.int32, device=device.device)
        image.zero_()
        self._send(self._image.block_tables, self._fields.block_tables)
        self.fill(())

    @property
    def eager_slots(self) -> Set[int]:
        """Those whose rows need more than the graphs do."""
        return self._memory.eager_slots

    def first(self, num_rows: int) -> DecoderInput:
        """The same memory as a step of so many rows. What only host code reads is left out."""
        fields, memory = self._fields, self._memory
        return DecoderInput(
            token_ids=fields.token_ids[:num_rows],
            positions=fields.positions[:num_rows],
            slot_mapping=fields.slot_mapping[:num_rows],
            logits_rows=self._rows[:num_rows],
            attention=AttentionInput(
                num_decode=num_rows,
                query_starts=(),
                context_lens=(),
                context_table=fields.contexts[:num_rows],
                block_tables=fields.block_tables[:num_rows],
                query_start_table=self._starts[: num_rows + 1],
                query_tiles=self._nothing.view(0, 2),
            ),
            lora=LoraInput(
                arena=memory.arena,
                dtype=memory.adapter_dtype,
                form=memory.adapter_form,
                tables=memory.tables,
                has_adapters=True,
                has_output_scales=False,
                segments=(),
                segment_table=None,
                tiles=LoraTiles(
                    short=fields.tiles[:num_rows],
                    starts=fields.tile_starts[: -(-num_rows // TILE_ROWS) + 1],
                    long=self._nothing.view(0, 3),
                ),
            ),
        )

    def fill(self, rows: Seq[Scheduled]) -> None:
        """Queue the copies of one step's inputs, padded to `max_rows`: one, or two."""
        if self._left is not None:
            self._left.synchronize()
        size, image = self._memory.block_tokens, self._image
        tables = [row.sequence.block_table for row in rows]
        tokens = [row.sequence.token_ids(row.start, row.start + 1)[0] for row in rows]
        starts = [row.start for row in rows]
        places = [
            table[start // size] * size + start % size
            for table, start in zip(tables, starts, strict=True)
        ]
        slots = [slot_at(row.sequence, row.start) for row in rows]
        tiles = decode_tiles(slots, self.max_rows)
        _write(image.token_ids, tokens, 0)
        _write(image.positions, starts, 0)
        _write(image.slot_mapping, places, -1)
        _write(image.contexts, [start + 1 for start in starts], 0)
        image.tiles.copy_(torch.tensor(pad_tiles(tiles.short, self.max_rows)))
        _write(image.tile_starts, tiles.starts, 0)
        self._send(self._image_head, self._head)
        self._send_tables(tables)
        self._left = self._stream.record()

    def _send_tables(self, tables: list[list[int]]) -> None:
        """Those that changed, and what lies between them: most steps change a few or none."""
        changed = [row for row, table in enumerate(tables) if self._tables[row] != table]
        for row in changed:
            # What stands behind it stays: blocks of an older table, which no context reaches.
            self._image.block_tables[row, : len(tables[row])] = torch.tensor(tables[row])
        if changed:
            between = slice(changed[0], changed[-1] + 1)
            self._send(self._image.block_tables[between], self._fields.block_tables[between])
        for row in changed:  # once they are on their way: a step that fails here sends them again
            self._tables[row] = list(tables[row])

    def _send(self, image: Tensor, device: Tensor) -> None:
        self._stream.copy(device, image)


def _write(field: Tensor, values: list[int], padding: int) -> None:
    field.copy_(torch.tensor([*values, *[padding] * (len(field) - len(values))]))


class DecodeGraphs:
    """Captured steps by their number of rows. Mutable: the contents of inputs and logits."""

    def __init__(
        self, graphs: Mapping[int, Captured], inputs: DecodeInputs, held: tuple[object, ...]
    ) -> None:
        """`held` is never looked at: it keeps alive the memory that the graphs point to."""
        self._graphs = dict(sorted(graphs.items()))
        self._inputs = inputs
        self._held = held

    @classmethod
    def capture(
        cls,
        forward: Forward,
        inputs: DecodeInputs,
        capturer: Capturer,
        progress: Progress = lambda done, total: None,
        max_bytes: int = MAX_BYTES,
    ) -> "DecodeGraphs":
        """All sizes up to the inputs', the largest first, in whose memory the others find room.

        What cannot be captured is left to the next larger graph, or to eager steps.
        """
        sizes = ladder(inputs.max_rows)[::-1]
        graphs: dict[int, Captured] = {}
        for done, size in enumerate(sizes):
            progress(done, len(sizes))
            if capturer.num_bytes > max_bytes:
                log.warning("no CUDA graphs for %d rows or fewer: out of their memory", size)
                break
            try:
                graphs[size] = _capture(forward, inputs.first(size), capturer)
            except torch.OutOfMemoryError:
                log.warning("no CUDA graph for %d rows: out of memory", size)
            except Exception:
                log.warning("no CUDA graphs for %d rows or fewer", size, exc_info=True)
                break
        progress(len(sizes), len(sizes))
        if graphs:
            sizes, held = tuple(sorted(graphs)), format_size(capturer.num_bytes)
            log.info("CUDA graphs for %s rows hold %s", ", ".join(map(str, sizes)), held)
        return cls(graphs, inputs, held=(forward, capturer))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._graphs)

    def run(self, rows: Seq[Scheduled]) -> Tensor | None:
        """Logits fp32 [rows that sample, vocab], good until the next step.

        None: not captured, or with a row of an adapter that graphs have no launches for.
        """
        size = next((size for size in self._graphs if size >= len(rows)), None)
        if size is None or any(row.num_tokens != 1 for row in rows):
            return None
        eager = self._inputs.eager_slots
        if eager and any(row.sequence.slot in eager for row in rows):
            return None
        self._inputs.fill(rows)
        captured = self._graphs[size]
        captured.graph.replay()
        sampling = [index for index, row in enumerate(rows) if row.samples]
        # A chunk of one token, the last the step had room for, need not be its prompt's end.
        is_all = len(sampling) == len(rows)
        return captured.logits[: len(rows)] if is_all else captured.logits[sampling]


def _capture(forward: Forward, step: DecoderInput, capturer: Capturer) -> Captured:
    with torch.inference_mode():
        return capturer.capture(lambda: forward(step))


def capture_on_cuda(
    forward: Forward,
    memory: DeviceMemory,
    max_rows: int,
    max_blocks: int,
    progress: Progress,
) -> DecodeGraphs:
    """Graphs for steps of up to `max_rows` sequences of up to `max_blocks` blocks each."""
    device = memory.arena.device
    compute = torch.cuda.default_stream(device)
    stream = CudaCopyStream(compute, compute)
    inputs = DecodeInputs(memory, max_rows, max_blocks, stream)
    return DecodeGraphs.capture(forward, inputs, CudaCapturer(device), progress)


Capture = Callable[[Forward, DeviceMemory, int, int, Progress], DecodeGraphs]
"""As `capture_on_cuda`."""


class CudaCapturer:
    """`Capturer` on a CUDA device. Mutable: `num_bytes`, and `_failed`, which are kept alive."""

    def __init__(self, device: torch.device) -> None:
        self.num_bytes = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def capture(self, region: Callable[[], Tensor]) -> Captured:
        # A capture that fails leaves its stream the current one; this puts the old one back.
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            region()  # compiles kernels, makes handles and workspaces: none of it may be recorded
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free = self._free
            graph = torch.cuda.CUDAGraph()
            # The allocator may go on to ask a graph whose capture broke off about its streams.
            self._failed.append(graph)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                logits = region()
            self._failed.pop()
            self.num_bytes += max(0, free - self._free)
        return Captured(graph, logits)

    @property
    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]
