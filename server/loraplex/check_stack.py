"""`loraplex check`'s case of what serves on a CPU with matrix tiles: all layers as one op.

A random decoder of a model's shapes but few layers and words, and one step of it: decode rows and a
chunk of a prefill, the base's and adapters', against the loop over the layers in fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from loraplex_kernels.bitsandbytes import functional
from loraplex_kernels.cases import Case, ModelShapes, Prepared
from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.nf4 import BLOCK_SIZE, BaseWeight, NF4Weight
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import NO_ADAPTER
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale, view
from torch import Tensor

from loraplex.engine.batch import DeviceMemory, build_input
from loraplex.engine.sequence import SamplingParams, StopParams
from loraplex.engine.sequence import Sequence as EngineSequence
from loraplex.engine.step import Scheduled
from loraplex.model.config import MODULES, ModelConfig, Rope
from loraplex.model.decoder import Activations, Decoder, DecoderLayer
from loraplex.model.linear import Linear

KERNEL = "stack"
NUM_LAYERS, NUM_WORDS = 2, 512
CPU = torch.device("cpu")

# Of each sequence: its context, how many of these tokens are computed, its slot. About the sizes at
# which vectors give way to tiles, and a tile, a block or a run of keys is full.
SEQUENCES = (
    *((context, 1, NO_ADAPTER) for context in (1, 15, 16, 17)),
    *((context, 1, 0) for context in (33, 127, 128, 129)),
    *((context, 1, 1) for context in (5, 511, 512, 513, 600)),
    *((context, 1, 2) for context in (40, 700)),
    *((90, 45, 0), (30, 30, NO_ADAPTER), (50, 5, 2)),
)
CONTEXT = max(context for context, _, _ in SEQUENCES)
NUM_SLOTS, SCALED_SLOT = 3, 1
SLOTS = [slot for _, count, slot in SEQUENCES for _ in range(count)]


def stack_case(shapes: ModelShapes, dtype: torch.dtype, max_rank: int) -> Case:
    """For CPU ops; those that have no such op go through the layers one by one."""
    return Case(
        kernel=KERNEL,
        name=f"{NUM_LAYERS} layers, {NUM_SLOTS} adapters, decode and chunks",
        num_rows=len(SLOTS),
        bytes_moved=_bytes_moved(shapes, dtype.itemsize, max_rank),
        make=lambda form: _PreparedStack(shapes, dtype, max_rank, form),
    )


def _ranks(max_rank: int) -> list[list[int]]:
    """Of each slot's modules; 0: not adapted."""
    wanted = ([16] * 7, [1, 17, 40, 0, 33, 8, 64], [max_rank] * 7)
    return [[min(rank, max_rank) for rank in ranks] for ranks in wanted]


def _bytes_moved(shapes: ModelShapes, itemsize: int, max_rank: int) -> int:
    weights = sum(linear.out_features * linear.in_features for linear in shapes.linears)
    modules = [(linear.in_features, p) for linear in shapes.linears for p in linear.projections]
    adapters = sum(
        ranks[p.module] * (in_features + p.width)
        for ranks in _ranks(max_rank)
        for in_features, p in modules
    )
    cached = sum(context for context, _, _ in SEQUENCES) * 2 * shapes.num_kv_heads * shapes.head_dim
    head = NUM_WORDS * shapes.hidden_size * itemsize
    layer = weights // 2 + 4 * weights // BLOCK_SIZE + (adapters + cached) * itemsize
    return NUM_LAYERS * layer + head


class _Form:
    """The decoder, its adapters and a cache in one dtype. Mutable: the cache, and `work`."""

    def __init__(self, decoder: Decoder, memory: DeviceMemory, cache: Tensor) -> None:
        self._decoder, self._memory, self._cache = decoder, memory, cache
        rows = len(SLOTS)
        self.work = Activations.allocate(decoder.config, decoder.dtype, CPU, rows, rows)

    def step(self, ops: Ops) -> Tensor:
        """fp32 logits of every row."""
        batch = build_input(_rows(self._memory.block_tokens), self._memory)
        every_row = replace(batch, logits_rows=torch.arange(len(SLOTS)))
        with torch.inference_mode():
            return self._decoder.forward(every_row, self._cache, ops, self.work)


def _rows(block_tokens: int) -> list[Scheduled]:
    """Each sequence's; its blocks lie apart from each other."""
    rows = []
    for index, (context, count, slot) in enumerate(SEQUENCES):
        tokens = [7 * (index + position) % NUM_WORDS for position in range(context)]
        sequence = EngineSequence(str(index), tokens, SamplingParams(), StopParams(1))
        sequence.slot = None if slot == NO_ADAPTER else slot
        num_blocks = -(-CONTEXT // block_tokens)
        sequence.block_table = [index + len(SEQUENCES) * at for at in range(num_blocks)]
        rows.append(Scheduled(sequence, context - count, count, samples=True))
    return rows


class _PreparedStack(Prepared):
    def __init__(
        self, shapes: ModelShapes, dtype: torch.dtype, max_rank: int, form: GranuleForm
    ) -> None:
        self._shapes, self._max_rank = shapes, max_rank
        self.memory = Memory(CPU, dtype, fill=True, form=form)
        self._weights = [_weights(shapes, self.memory) for _ in range(NUM_LAYERS)]
        hidden = shapes.hidden_size
        self._norms = [1 + self._normal(hidden) / 8 for _ in range(2 * NUM_LAYERS + 1)]
        self._embedding = self._normal(NUM_WORDS, hidden).to(dtype)
        self._head = self._normal(NUM_WORDS, hidden).to(dtype)
        num_blocks = len(SEQUENCES) * -(-CONTEXT // shapes.block_tokens)
        sides = (NUM_LAYERS, 2, shapes.num_kv_heads, shapes.block_tokens, shapes.head_dim)
        self._cache = self.memory.normal(num_blocks, *sides)
        self._form = self._in(dtype)

    def _normal(self, *shape: int) -> Tensor:
        return self.memory.normal(*shape, dtype=torch.float32)

    def poison(self) -> None:
        self._form.work.logits.fill_(torch.nan)

    def call(self, ops: Ops) -> None:
        self._form.step(ops)

    def result(self) -> Tensor:
        return self._form.work.logits.clone()

    def expected(self) -> Tensor:
        return self._in(torch.float32).step(TorchOps())

    def _in(self, dtype: torch.dtype) -> _Form:
        """The same values in another type."""
        config, norms = _config(self._shapes), self._norms
        layers = []
        for index, weights in enumerate(self._weights):
            qkv, o, gate_up, down = (
                Linear(BaseWeight(weight, None), None, shape.projections)
                for weight, shape in zip(weights, self._shapes.linears, strict=True)
            )
            before, between = norms[2 * index : 2 * index + 2]
            layers.append(DecoderLayer(before, qkv, o, between, gate_up, down))
        embedding, head = self._embedding.to(dtype), self._head.to(dtype)
        decoder = Decoder(config, embedding, layers, norms[-1], head, dtype)
        memory = self.memory if dtype == self.memory.dtype else Memory(CPU, dtype, fill=True)
        cache = self._cache if dtype == self.memory.dtype else self._cache.to(dtype)
        arena, tables = _adapters(config, memory, _ranks(self._max_rank), self._max_rank)
        block_tokens = self._shapes.block_tokens
        return _Form(decoder, DeviceMemory(arena, dtype, memory.form, tables, block_tokens), cache)


def _config(shapes: ModelShapes) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        num_layers=NUM_LAYERS,
        num_heads=shapes.num_heads,
        num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        vocab_size=NUM_WORDS,
        context_length=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        rope=Rope(10000.0),
    )


def _weights(shapes: ModelShapes, memory: Memory) -> list[NF4Weight]:
    """One layer's, which keep the size of what they read."""
    levels = functional.get_4bit_type("nf4", device=memory.device)
    weights = []
    for linear in shapes.linears:
        n, k = linear.out_features, linear.in_features
        absmax = memory.uniform(n * k // BLOCK_SIZE, low=0.5, high=2.5) * k**-0.5
        weights.append(NF4Weight(memory.codes(n, k // 2), absmax, levels))
    return weights


def _adapters(
    config: ModelConfig, memory: Memory, ranks: Sequence[Sequence[int]], max_rank: int
) -> tuple[Tensor, AdapterTables]:
    """Every slot's, in all layers, the same in each dtype; SCALED_SLOT scales what it touches."""
    rng = torch.Generator().manual_seed(11)
    dtype, shapes = memory.dtype, config.module_shapes
    size = memory.form.num_bytes(max(max(shape) for shape in shapes), torch.float32)
    granules = sum(-(-rank // GRANULE_RANK) for own in ranks for rank in own)
    pieces = config.num_layers * (2 * granules + len(MODULES))
    arena = memory.poisoned(pieces * size, dtype=torch.uint8)
    tables = AdapterTables(NUM_SLOTS, config.num_layers, len(MODULES), max_rank, CPU)
    places = iter(index * size for index in memory.shuffled(pieces))

    def normal(rows: int, width: int, std: float) -> Tensor:
        return (torch.randn(rows, width, generator=rng) * std).bfloat16().to(dtype)

    def granules_of(own: Sequence[int]) -> Iterator[Granule]:
        for layer in range(config.num_layers):
            for module, ((n, k), rank) in enumerate(zip(shapes, own, strict=True)):
                for part in range(-(-rank // GRANULE_RANK)):
                    rows = min(rank - part * GRANULE_RANK, GRANULE_RANK)
                    a, b = next(places), next(places)
                    memory.form.write_a(arena, a, normal(rows, k, k**-0.5))
                    memory.form.write_b(arena, b, normal(rows, n, rank**-0.5))
                    yield Granule(layer, module, part, a, b, 0.75)

    def scales() -> Iterator[OutputScale]:
        for layer in range(config.num_layers):
            for module, (n, _) in enumerate(shapes):
                place = next(places)
                factors = view(arena, place, 1, n, torch.float32)
                factors.copy_(0.5 + torch.rand(n, generator=rng))
                yield OutputScale(layer, module, place)

    for slot, own in enumerate(ranks):
        written = list(granules_of(own))
        tables.write(slot, written, list(scales()) if slot == SCALED_SLOT else ())
    return arena, tables
