"""A small random Llama, its arena and adapters, put together without any file."""

from collections.abc import Sequence as Seq

import torch
from loraplex.adapters.packing import PackedAdapter, Placed, place
from loraplex.engine.batch import DeviceMemory
from loraplex.engine.graphs import DecodeInputs
from loraplex.engine.model_runner import block_shape
from loraplex.model import nf4
from loraplex.model.config import MODULES, ModelConfig, Rope
from loraplex.model.decoder import Activations, Decoder, DecoderLayer
from loraplex.model.linear import Linear
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import Projection
from loraplex_kernels.tables import AdapterTables, Granule
from torch import Tensor

from tests.server.engine.lazy_streams import LazyCopyStream, LazyDevice

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    vocab_size=48,
    context_length=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
    rope=Rope(1e4),
)
MAX_RANK = 64
MAX_ROWS = 8


class TinyLlama:
    """Mutable: the arena. `free` blocks are NaN until somebody takes them."""

    def __init__(
        self, dtype: torch.dtype, num_blocks: int, max_slots: int, is_packed: bool = False
    ) -> None:
        self.rng = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.block = block_shape(CONFIG, dtype, dtype)
        self.arena = torch.full((num_blocks * self.block.size,), 0xFF, dtype=torch.uint8)
        self.blocks = self.arena.view(num_blocks, self.block.size)
        self.free = torch.randperm(num_blocks, generator=self.rng).tolist()
        self.kv_cache = self.arena.view(dtype).view(
            num_blocks, CONFIG.num_layers, 2, CONFIG.num_kv_heads, self.block.tokens, -1
        )
        self.tables = AdapterTables(max_slots, CONFIG.num_layers, len(MODULES), MAX_RANK, CPU)
        self.activations = Activations.allocate(CONFIG, dtype, CPU, MAX_ROWS, MAX_ROWS)
        self._is_packed = is_packed  # the weights have no dense copy
        self.decoder = self._decoder()

    def memory(self, with_tiles: bool) -> DeviceMemory:
        form = GranuleForm.ROWS
        return DeviceMemory(
            self.arena, self.dtype, form, self.tables, self.block.tokens, with_tiles
        )

    def decode_inputs(self) -> DecodeInputs:
        stream = LazyDevice(chance=[1]).stream()  # not late at all
        return DecodeInputs(
            self.memory(with_tiles=True),
            MAX_ROWS,
            CONFIG.context_length // self.block.tokens,
            LazyCopyStream(stream, stream),
        )

    def take_kv(self, num_tokens: int) -> list[int]:
        """Blocks that hold random keys and values for so many tokens, and NaN behind them."""
        table = [self.free.pop() for _ in range(-(-num_tokens // self.block.tokens))]
        for index, block in enumerate(table):
            used = min(self.block.tokens, num_tokens - index * self.block.tokens)
            cache = self.kv_cache[block, :, :, :, :used]
            cache.copy_(self._random(*cache.shape))
        return table

    def bind(self, slot: int, ranks: Seq[int]) -> None:
        """A random adapter, in blocks of its own."""
        packed = self.adapter(ranks)
        blocks = [self.free.pop() for _ in range(packed.num_blocks)]
        self.blocks[blocks] = packed.data
        self.tables.write(slot, packed.placed(blocks).granules)

    def adapter(self, ranks: Seq[int]) -> PackedAdapter:
        """A random one with these ranks of MODULES; 0: not adapted."""
        pieces = [
            (shape, layer, index, part)
            for layer in range(CONFIG.num_layers)
            for index, shape in enumerate(CONFIG.module_shapes)
            for part in range(-(-ranks[index] // GRANULE_RANK))
        ]
        sizes = [
            GRANULE_RANK * width * self.dtype.itemsize
            for (out_features, in_features), *_ in pieces
            for width in (in_features, out_features)
        ]
        offsets, num_blocks = place(sizes, self.block.size)
        data = torch.zeros(num_blocks * self.block.size, dtype=torch.uint8)
        granules = []
        for number, (_, layer, index, part) in enumerate(pieces):
            rank = min(GRANULE_RANK, ranks[index] - GRANULE_RANK * part)
            for which in (2 * number, 2 * number + 1):
                matrix = data[offsets[which] :][: sizes[which]].view(self.dtype)
                rows = matrix.view(GRANULE_RANK, -1)[:rank]
                rows.copy_(self._random(*rows.shape) / 4)
            granules.append(
                Granule(layer, index, part, offsets[2 * number], offsets[2 * number + 1], 0.5)
            )
        return PackedAdapter(data.view(num_blocks, -1), Placed(tuple(granules)))

    def _decoder(self) -> Decoder:
        hidden, vocab = CONFIG.hidden_size, CONFIG.vocab_size
        layers = [
            DecoderLayer(
                input_norm=1 + self._random(hidden) / 4,
                qkv=self._linear(0, 1, 2, bias=True),
                o=self._linear(3),
                post_attention_norm=1 + self._random(hidden) / 4,
                gate_up=self._linear(4, 5),
                down=self._linear(6),
            )
            for _ in range(CONFIG.num_layers)
        ]
        embedding = self._random(vocab, hidden).to(self.dtype)
        head = (self._random(vocab, hidden) / 8).to(self.dtype)
        return Decoder(CONFIG, embedding, layers, torch.ones(hidden), head, self.dtype)

    def _linear(self, *modules: int, bias: bool = False) -> Linear:
        shapes = [CONFIG.module_shapes[module] for module in modules]
        height, width = sum(out for out, _ in shapes), shapes[0][1]
        weight = nf4.quantize(self._random(height, width) / width**0.5)
        columns = [sum(out for out, _ in shapes[:index]) for index in range(len(shapes))]
        return Linear(
            BaseWeight(weight, None if self._is_packed else weight.dequantize().to(self.dtype)),
            self._random(height).to(self.dtype) if bias else None,
            tuple(
                Projection(module, column, out)
                for module, column, (out, _) in zip(modules, columns, shapes, strict=True)
            ),
        )

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng)
