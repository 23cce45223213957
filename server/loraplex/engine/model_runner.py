"""The device side of the engine: one forward pass a step, adapters copied in beside it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.ops import Ops
from loraplex_kernels.pages import prefer_large_pages
from loraplex_kernels.segments import LONG_TILE_ROWS
from loraplex_kernels.tables import AdapterTables, OutputScale
from torch import Tensor

from loraplex.adapters.packing import PackedAdapter, Placed, blended
from loraplex.engine.batch import DeviceMemory, build_input
from loraplex.engine.graphs import Capture, DecodeGraphs, capture_on_cuda
from loraplex.engine.sampler import confirm, is_greedy, sample
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Drawn, Scheduled
from loraplex.engine.transfer import copier_for
from loraplex.model.config import MODULES, ModelConfig
from loraplex.model.decoder import Activations, Decoder, DecoderInput
from loraplex.model.loader import Progress

BLOCK_QUANTUM = 16
"""A block holds a multiple of so many tokens' KV."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """An arena block: exactly the KV of `tokens` tokens over all layers, in bytes `size`."""

    tokens: int
    size: int


def block_shape(
    config: ModelConfig, kv_dtype: torch.dtype, adapter_dtype: torch.dtype
) -> BlockShape:
    """The smallest block that holds the largest granule of the layers' linears, in any form."""
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * kv_dtype.itemsize
    features = max(max(shape) for shape in config.module_shapes)
    granule = max(form.num_bytes(features, adapter_dtype) for form in GranuleForm)
    tokens = BLOCK_QUANTUM
    while tokens * per_token < granule:
        tokens += BLOCK_QUANTUM
    return BlockShape(tokens, tokens * per_token)


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Sizes that are fixed at start."""

    num_blocks: int
    max_slots: int
    max_rank: int
    max_rows: int  # tokens of one step
    max_running: int  # sequences of one step
    device: torch.device
    max_drafts: int = 0  # of one step, over all its sequences


class ModelRunner:
    """Owns the arena's bytes and the tables; runs on the engine thread but for `copy_adapter`.

    Mutable: the contents of all this memory, `_placed`, what each slot was last bound to, and
    `_graphs`, set once before the first step.
    """

    def __init__(self, decoder: Decoder, ops: Ops, config: RunnerConfig) -> None:
        model, dtype = decoder.config, decoder.dtype
        self._decoder = decoder
        self._ops = ops
        block = block_shape(model, dtype, dtype)
        # Not zeroed: nothing is read before it was written, and pages come as they are touched.
        arena = torch.empty(config.num_blocks * block.size, dtype=torch.uint8, device=config.device)
        prefer_large_pages(arena)
        self._blocks = arena.view(config.num_blocks, block.size)
        self._copier = copier_for(config.device, block.size)
        self._kv_cache = arena.view(dtype).view(
            config.num_blocks, model.num_layers, 2, model.num_kv_heads, block.tokens, model.head_dim
        )
        tables = AdapterTables(
            config.max_slots, model.num_layers, len(MODULES), config.max_rank, config.device
        )
        self._memory = DeviceMemory(
            arena, dtype, ops.granule_form(dtype), tables, block.tokens, ops.uses_tiles
        )
        self._placed: dict[int, Placed] = {}
        self._num_threads = torch.get_num_threads()
        self._max_rows = config.max_rows
        self._max_running = min(config.max_running, config.max_rows)
        self._graphs: DecodeGraphs | None = None
        self._activations = Activations.allocate(
            model,
            dtype,
            config.device,
            config.max_rows,
            config.max_running + config.max_drafts,
        )

    def warm_up(self) -> None:
        """Each kind of step once, before there are requests: what cannot run raises here.

        Slot 0 holds nothing yet, but its kernels are compiled; the blocks are nobody's. First as
        a plain adapter's, then as one whose output is scaled (DoRA's).
        """
        self._trial_steps()
        self._memory.bind(0, Placed((), (OutputScale(0, 0, offset=-1),)))  # -1: by nothing
        self._trial_steps()
        self._memory.bind(0, Placed(()))

    def _trial_steps(self) -> None:
        size = self._memory.block_tokens
        room = min(self._max_rows, len(self._blocks) * size)
        for num_tokens, temperature in ((1, 1.0), (1, 0.0), (2, 1.0), (LONG_TILE_ROWS + 1, 1.0)):
            num_tokens = min(num_tokens, room)
            sampling = SamplingParams(temperature=temperature)
            sequence = Sequence("warm-up", [0] * num_tokens, sampling, StopParams(1), slot=0)
            sequence.block_table = list(range(-(-num_tokens // size)))
            self.run([Scheduled(sequence, 0, num_tokens, samples=True)])

    def capture_graphs(self, progress: Progress, capture: Capture = capture_on_cuda) -> None:
        """Before the first step: from then on steps of decode rows are replayed."""
        max_blocks = -(-self._decoder.config.context_length // self._memory.block_tokens)
        self._graphs = capture(self._forward, self._memory, self._max_running, max_blocks, progress)

    def run(self, rows: Seq[Scheduled]) -> list[Drawn]:
        """One forward pass over all rows; what was drawn for those that sample, in order."""
        if torch.get_num_threads() != self._num_threads:
            # Torch counts by thread, and gives a new one what any thread was last told to use.
            torch.set_num_threads(self._num_threads)
        sampling = [row for row in rows if row.samples]
        with torch.inference_mode():
            logits = None if self._graphs is None else self._graphs.run(rows)
            if logits is None:
                step = build_input(rows, self._memory)
                if is_greedy(sampling) and self._decoder.chooses(step, self._ops):
                    return confirm(self._choose(step).tolist(), sampling)
                logits = self._forward(step)
            return sample(logits, sampling)

    def _forward(self, step: DecoderInput) -> Tensor:
        return self._decoder.forward(step, self._kv_cache, self._ops, self._activations)

    def _choose(self, step: DecoderInput) -> Tensor:
        return self._decoder.choose(step, self._kv_cache, self._ops, self._activations)

    def copy_adapter(self, packed: PackedAdapter, blocks: Seq[int]) -> None:
        """Weights into blocks that no step reads yet; may run on any thread."""
        self._copier.copy(packed.data, (self._blocks[block] for block in blocks))

    def bind_slot(self, slot: int, packed: PackedAdapter, blocks: Seq[int]) -> None:
        """From the next step on, `slot` is this adapter."""
        self._bind(slot, packed.placed(blocks))

    def bind_blend(self, slot: int, members: Seq[tuple[int, float]]) -> None:
        """From the next step on, `slot` is the weighted sum of what other slots hold."""
        self._bind(slot, blended((self._placed[member], weight) for member, weight in members))

    def _bind(self, slot: int, placed: Placed) -> None:
        self._placed[slot] = placed
        self._memory.bind(slot, placed)
