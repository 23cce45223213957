"""All layers in one call compute what the loop over them does, and round less."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from loraplex.model.config import MODULES, ModelConfig, Rope
from loraplex.model.decoder import Activations, Decoder, DecoderInput, DecoderLayer
from loraplex.model.linear import Linear
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.native import NativeOps
from loraplex_kernels.nf4 import BaseWeight, NF4Weight
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import NO_ADAPTER, segments_of
from loraplex_kernels.stack import StepLimits
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale, view
from torch import Tensor

from tests.kernels.inputs import poison
from tests.kernels.tiles import HAS_TILES

CPU = torch.device("cpu")
BLOCK_TOKENS, BLOCKS_A_SEQUENCE, NUM_SEQUENCES = 16, 6, 7
NUM_BLOCKS = NUM_SEQUENCES * BLOCKS_A_SEQUENCE
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=128,
    intermediate_size=192,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=24,
    vocab_size=101,
    context_length=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    rope=Rope(10000.0),
)
RANKS = ((16,) * 7, (1, 17, 40, 0, 33, 8, 64), (0, 0, 0, 24, 0, 0, 0), (4,) * 7)
SCALED = {1: (0, 3, 4), 3: range(7)}  # modules whose outputs a slot scales


class Weights:
    """Random 4-bit linears and adapters, in the type that is asked for."""

    def __init__(self, has_bias: bool) -> None:
        rng = torch.Generator().manual_seed(11)
        self.rng = rng
        config = CONFIG
        stacks = ((0, 1, 2), (3,), (4, 5), (6,))
        self.linears = [[self._weight(stack) for stack in stacks] for _ in range(config.num_layers)]
        self.biases = [
            [self._normal(w.out_features) if has_bias else None for w in layer]
            for layer in self.linears
        ]
        self.norms = [1 + 0.1 * self._normal(config.hidden_size) for _ in range(7)]
        self.embedding = self._normal(config.vocab_size, config.hidden_size).bfloat16()
        self.head = self._normal(config.vocab_size, config.hidden_size).bfloat16()
        self.adapters = [self._matrices(ranks) for ranks in RANKS]
        self.scales = {
            (slot, layer, module): 0.5 + torch.rand(config.module_shapes[module][0], generator=rng)
            for slot, modules in SCALED.items()
            for layer in range(config.num_layers)
            for module in modules
        }

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)

    def _weight(self, modules: Sequence[int]) -> NF4Weight:
        n, k = sum(CONFIG.module_shapes[m][0] for m in modules), CONFIG.module_shapes[modules[0]][1]
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=self.rng)
        absmax = (torch.rand(n * k // 64, generator=self.rng) + 0.5) * 2 * k**-0.5
        return NF4Weight(codes, absmax, torch.linspace(-1.0, 1.0, 16))

    def _matrices(self, ranks: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        return [
            [
                (self._normal(rank, k) * k**-0.5, self._normal(n, rank) * max(rank, 1) ** -0.5)
                for rank, (n, k) in zip(ranks, CONFIG.module_shapes, strict=True)
            ]
            for _ in range(CONFIG.num_layers)
        ]

    def decoder(self, dtype: torch.dtype, is_dense: bool) -> Decoder:
        layers = []
        for index in range(CONFIG.num_layers):
            qkv, o, gate_up, down = (
                self._linear(index, place, modules, dtype, is_dense)
                for place, modules in enumerate(((0, 1, 2), (3,), (4, 5), (6,)))
            )
            norms = self.norms[2 * index : 2 * index + 2]
            layers.append(DecoderLayer(norms[0], qkv, o, norms[1], gate_up, down))
        embedding, head = self.embedding.to(dtype), self.head.to(dtype)
        return Decoder(CONFIG, embedding, layers, self.norms[6], head, dtype)

    def _linear(
        self, layer: int, place: int, modules: Sequence[int], dtype: torch.dtype, is_dense: bool
    ) -> Linear:
        weight, bias = self.linears[layer][place], self.biases[layer][place]
        widths = [CONFIG.module_shapes[module][0] for module in modules]
        projections = tuple(
            Projection(module, sum(widths[:i]), width)
            for i, (module, width) in enumerate(zip(modules, widths, strict=True))
        )
        dense = weight.dequantize().to(dtype) if is_dense else None
        rounded = None if bias is None else bias.bfloat16().to(dtype)
        return Linear(BaseWeight(weight, dense), rounded, projections)

    def tables(self, dtype: torch.dtype, form: GranuleForm) -> tuple[Tensor, AdapterTables]:
        room = GRANULE_RANK * 256 * dtype.itemsize
        arena = poison(800 * room)
        tables = AdapterTables(len(RANKS), CONFIG.num_layers, len(MODULES), 64, CPU)
        places = iter((torch.randperm(800, generator=self.rng) * room).tolist())
        for slot, layers in enumerate(self.adapters):
            granules = []
            for layer, matrices in enumerate(layers):
                for module, (a, b) in enumerate(matrices):
                    for part in range(-(-len(a) // GRANULE_RANK)):
                        a_at, b_at = next(places), next(places)
                        ranks = slice(part * GRANULE_RANK, (part + 1) * GRANULE_RANK)
                        form.write_a(arena, a_at, a[ranks].bfloat16().to(dtype))
                        form.write_b(arena, b_at, b.T[ranks].bfloat16().to(dtype))
                        granules.append(Granule(layer, module, part, a_at, b_at, 0.5 + slot / 4))
            scales = []
            for (of, layer, module), factor in self.scales.items():
                if of == slot:
                    scales.append(OutputScale(layer, module, next(places)))
                    view(arena, scales[-1].offset, 1, len(factor), torch.float32).copy_(factor)
            tables.write(slot, granules, scales)
        return arena, tables


class Sequences:
    """A decoder over sequences with a paged cache. Mutable: the cache, and `_lengths`."""

    def __init__(self, weights: Weights, dtype: torch.dtype, ops: Ops, is_dense: bool) -> None:
        self._decoder = weights.decoder(dtype, is_dense)
        self._ops = ops
        self._form = ops.granule_form(dtype)
        self._arena, self._tables = weights.tables(dtype, self._form)
        shape = (CONFIG.num_layers, 2, CONFIG.num_kv_heads, BLOCK_TOKENS, CONFIG.head_dim)
        self._cache = torch.full((NUM_BLOCKS, *shape), torch.nan, dtype=dtype)
        self._memory = Activations.allocate(CONFIG, dtype, CPU, 200, 200)
        self._lengths = [0] * NUM_SEQUENCES

    @property
    def is_fused(self) -> bool:
        return self._decoder.fused(self._ops) is not None

    def step(self, *rows: tuple[int, int, int]) -> Tensor:
        """`(sequence, its adapter, how many tokens)`, one token each first; logits of all rows."""
        tokens, positions, places, slots, contexts, tables = [], [], [], [], [], []
        starts = [0]
        for sequence, slot, count in rows:
            first = self._lengths[sequence]
            self._lengths[sequence] = first + count
            blocks = [NUM_SEQUENCES * i + sequence for i in range(BLOCKS_A_SEQUENCE)]
            for position in range(first, first + count):
                tokens.append((31 * sequence + 7 * position) % CONFIG.vocab_size)
                positions.append(position)
                block = blocks[position // BLOCK_TOKENS]
                places.append(block * BLOCK_TOKENS + position % BLOCK_TOKENS)
                slots.append(slot)
            contexts.append(first + count)
            tables.append(blocks)
            starts.append(starts[-1] + count)
        segments = segments_of(slots)
        batch = DecoderInput(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(places),
            logits_rows=torch.arange(len(tokens)),
            attention=AttentionInput(
                num_decode=sum(1 for _, _, count in rows if count == 1),
                query_starts=starts,
                context_lens=contexts,
                context_table=torch.tensor(contexts, dtype=torch.int32),
                block_tables=torch.tensor(tables, dtype=torch.int32),
                query_start_table=torch.tensor(starts, dtype=torch.int32),
                query_tiles=None,
            ),
            lora=LoraInput(
                arena=self._arena,
                dtype=self._decoder.dtype,
                form=self._form,
                tables=self._tables,
                has_adapters=bool(segments),
                has_output_scales=any(slot in SCALED for slot in slots),
                segments=segments,
                segment_table=torch.tensor(segments, dtype=torch.int32).view(-1, 3),
                tiles=None,
            ),
        )
        with torch.inference_mode():
            return self._decoder.forward(batch, self._cache, self._ops, self._memory).clone()


NONE = NO_ADAPTER
STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((0, NONE, 33), (1, 0, 20), (2, 1, 37)),
    ((1, 0, 1), (0, NONE, 1), (2, 1, 1)),
    ((0, NONE, 1), (1, 2, 1), (2, 1, 5), (3, 3, 60)),
    ((0, NONE, 1), (3, NONE, 1)),
)

if HAS_TILES:

    @pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biases"])
    def test_as_exact_as_the_loop(team_ops: NativeOps, has_bias: bool) -> None:
        weights = Weights(has_bias)
        fused = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        loop = Sequences(weights, torch.bfloat16, TorchOps(), is_dense=True)
        exact = Sequences(weights, torch.float32, TorchOps(), is_dense=True)
        assert fused.is_fused
        assert not loop.is_fused
        for rows in STEPS:
            expected = exact.step(*rows)
            error = (fused.step(*rows) - expected).norm() / expected.norm()
            error_of_loop = (loop.step(*rows) - expected).norm() / expected.norm()
            assert error <= 1.1 * error_of_loop, rows
            assert error <= 0.04, rows

    @pytest.mark.parametrize("slot", [3, 1], ids=["of its own", "of the row before it"])
    def test_a_row_is_its_own(team_ops: NativeOps, slot: int) -> None:
        """Decode rows have the same bits whoever shares their step, and so has a prompt beside
        them, whose adapter may be theirs."""
        weights = Weights(has_bias=False)
        together = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        alone = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        crowded = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        for each in (together, alone, crowded):
            each.step(*STEPS[0])
        rows, prompt = STEPS[1], (3, slot, 66)
        expected = torch.cat([alone.step(row) for row in (*rows, prompt)])
        assert torch.equal(together.step(*rows), expected[: len(rows)])
        assert torch.equal(crowded.step(*rows, prompt), expected)

    @pytest.mark.parametrize(
        "rows",
        [
            ((0, NONE, 71), (1, 0, 57), (2, 1, 5), (3, 3, 64)),
            ((0, NONE, 71), (1, 0, 57), (2, 0, 5), (3, 2, 64)),
            tuple((sequence, sequence % 2 * 2, 4) for sequence in range(7)),
        ],
        ids=["all of them", "without scales", "many in a chunk"],
    )
    def test_a_prompt_is_its_own(
        team_ops: NativeOps, rows: tuple[tuple[int, int, int], ...]
    ) -> None:
        """So do prompts: alone, or in a step whose tasks are of half its rows each."""
        weights = Weights(has_bias=False)
        together = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        alone = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        expected = torch.cat([alone.step(row) for row in rows])
        assert torch.equal(together.step(*rows), expected)

    def test_without_wanted_rows_the_cache_is_written(team_ops: NativeOps) -> None:
        weights = Weights(has_bias=False)
        fused = Sequences(weights, torch.bfloat16, team_ops, is_dense=False)
        fused.step((0, 0, 20))
        assert int(fused._cache.isfinite().sum()) == fused._cache[0].numel() // 16 * 20

    def test_its_memory_grows_with_each_limit(native_library: ctypes.CDLL) -> None:
        decoder = Weights(has_bias=False).decoder(torch.bfloat16, is_dense=False)
        fused = decoder.fused(NativeOps(native_library))
        assert fused is not None
        limits = StepLimits(
            max_rows=64, max_logits=8, max_sequences=8, context_length=512, max_rank=16
        )
        least = fused.num_bytes(limits)
        widest, scratch = CONFIG.intermediate_size, 192 * 2 * 4 * (CONFIG.head_dim + 2)
        assert least >= 2 * 64 * widest + torch.get_num_threads() * (2 * 32 * widest + scratch)
        for name, size in (
            *(("max_rows", 512), ("max_logits", 96), ("max_sequences", 32)),
            *(("context_length", 1024), ("max_rank", 32)),
        ):
            assert fused.num_bytes(replace(limits, **{name: size})) > least, name
