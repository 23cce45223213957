"""A decoder's steps through captured graphs, by the stand-in, beside eager ones in plain torch."""

import pytest
import torch
from loraplex.engine.batch import build_input
from loraplex.engine.graphs import DecodeGraphs, ladder
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Scheduled
from loraplex_kernels.gpu.interpreter import repair
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.ops import TritonOps
from loraplex_kernels.gpu.paths import LinearPath, PathTable
from loraplex_kernels.reference import TorchOps
from torch import Tensor

from tests.server.engine.recorded_graphs import Recorder
from tests.server.engine.tiny_llama import CONFIG, CPU, MAX_ROWS, TinyLlama

RANKS = ((16,) * 7, (1, 17, 64, 0, 0, 8, 33), (0, 0, 0, 0, 4, 4, 4))
OTHER_RANKS = (64, 0, 3, 32, 16, 16, 0)


class CapturedLlama:
    """Every step runs twice from the same arena: eagerly in torch, then as a replay."""

    def __init__(self, dtype: torch.dtype, path: LinearPath, target: str, tolerance: float) -> None:
        repair()
        self.model = TinyLlama(dtype, num_blocks=128, max_slots=len(RANKS))
        for slot, ranks in enumerate(RANKS):
            self.model.bind(slot, ranks)
        self._tolerance = tolerance
        self.recorder = Recorder(launch_now)
        paths = PathTable({}, ((1, path),))
        ops = TritonOps(CPU, target, paths, launch=self.recorder.launch)
        model = self.model
        self.graphs = DecodeGraphs.capture(
            lambda step: model.decoder.forward(step, model.kv_cache, ops, model.activations),
            model.decode_inputs(),
            self.recorder,
        )

    def sequence(self, num_tokens: int, slot: int | None) -> Sequence:
        """Its last token is about to run; keys and values of the others lie in the arena."""
        tokens = torch.randint(0, CONFIG.vocab_size, (num_tokens,), generator=self.model.rng)
        sequence = Sequence("r", tokens.tolist(), SamplingParams(), StopParams(9), slot=slot)
        sequence.block_table = self.model.take_kv(num_tokens)
        return sequence

    def step(self, *sequences: Sequence) -> None:
        model = self.model
        rows = [Scheduled(s, s.num_tokens - 1, 1, True) for s in sequences]
        before = model.arena.clone()
        expected = self._eagerly(rows)
        after = model.kv_cache.clone()
        model.arena.copy_(before)
        for name in model.activations.__slots__:
            getattr(model.activations, name).fill_(torch.nan)
        logits = self.graphs.run(rows)
        assert logits is not None
        assert self._error(logits, expected) < self._tolerance
        written = self._places(rows)
        assert self._error(model.kv_cache[written], after[written]) < self._tolerance
        model.kv_cache[written] = before.view(model.dtype).view_as(model.kv_cache)[written]
        assert torch.equal(model.arena, before), "a row wrote where it has no business"

    def _eagerly(self, rows: list[Scheduled]) -> Tensor:
        model = self.model
        step = build_input(rows, model.memory(with_tiles=False))
        return model.decoder.forward(step, model.kv_cache, TorchOps(), model.activations).clone()

    def _places(self, rows: list[Scheduled]) -> Tensor:
        """Where the rows' keys and values go, as a mask over the cache."""
        mask = torch.zeros(self.model.kv_cache.shape, dtype=torch.bool)
        size = self.model.block.tokens
        for row in rows:
            block = row.sequence.block_table[row.start // size]
            mask[block, :, :, :, row.start % size] = True
        return mask

    def _error(self, found: Tensor, expected: Tensor) -> float:
        return float((found.float() - expected.float()).abs().max() / expected.abs().max())


PATHS = {
    # A GPU's configurations split keys and K; the interpreter's own do not.
    "dense": (torch.float32, LinearPath.BITSANDBYTES, "sm_90", 1e-5),
    "fused": (torch.float16, LinearPath.FUSED, "interpreter", 1e-2),
}


@pytest.mark.parametrize("path", PATHS)
def test_replays_are_the_eager_steps(path: str) -> None:
    """Whatever changed after the capture but the sizes: adapters, ranks, tables, contexts."""
    llama = CapturedLlama(*PATHS[path])
    assert llama.graphs.sizes == ladder(MAX_ROWS)
    assert ("_linear" in llama.recorder.graphs[0].names) == (path == "fused")
    base = [llama.sequence(num_tokens, None) for num_tokens in (1, 20, 100)]
    first, second, third = (
        llama.sequence(num_tokens, slot) for slot, num_tokens in enumerate((16, 17, 40))
    )
    llama.step(first)
    llama.step(*base)
    llama.step(base[0], first, second, third)
    llama.step(base[1], second)
    twins = [llama.sequence(num_tokens, 2) for num_tokens in (2, 3, 64, 65, 5)]
    llama.step(third, *twins)
    llama.model.bind(0, OTHER_RANKS)
    llama.step(base[2], first, *[llama.sequence(num_tokens, 0) for num_tokens in (1, 128)], third)
    llama.model.tables.write(0, [])
    first.block_table = llama.model.take_kv(first.num_tokens)
    llama.step(first)


def test_padding_alone_does_nothing() -> None:
    """What capture and warm-up run on."""
    llama = CapturedLlama(*PATHS["dense"])
    before = llama.model.arena.clone()
    llama.recorder.graphs[1].replay()  # of 4 rows
    assert torch.equal(llama.model.arena, before)
    assert bool(llama.model.activations.logits[:4].isfinite().all())
