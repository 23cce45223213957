"""Build the decoder from a checkpoint, quantising to NF4 tensor by tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from loraplex_kernels.nf4 import BaseWeight, NF4Weight
from loraplex_kernels.ops import Projection
from loraplex_kernels.pages import Shelf
from torch import Tensor

from loraplex.errors import ModelError
from loraplex.model import nf4
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import MODULES, ModelConfig, linear_prefix, read_json
from loraplex.model.decoder import Decoder, DecoderLayer
from loraplex.model.linear import Linear, WeightForm
from loraplex.model.nf4_cache import NF4Cache

Progress = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where the weights go, and in which forms."""

    device: torch.device
    dtype: torch.dtype
    form: WeightForm
    cache: NF4Cache | None = None  # of codes that were made on this kind of device


def is_quantized(folder: Path) -> bool:
    """Whether a checkpoint is in bitsandbytes' NF4 already; ModelError for any other scheme."""
    settings = read_json(folder / "config.json").get("quantization_config")
    if settings is None:
        return False
    method, kind = settings.get("quant_method"), settings.get("bnb_4bit_quant_type")
    if method != "bitsandbytes" or not settings.get("load_in_4bit") or kind != "nf4":
        raise ModelError(
            f"config.json: quantisation {method!r} is not supported; give the full-precision "
            "checkpoint, or one in bitsandbytes' nf4"
        )
    return True


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    options: LoadOptions,
    progress: Progress = lambda done, total: None,
) -> Decoder:
    """Read, quantise and place every weight; at most one layer is in full precision at a time."""
    reader = _Reader(checkpoint, config, options)
    layers = []
    for index in range(config.num_layers):
        layers.append(reader.layer(index))
        progress(index + 1, config.num_layers)
    shape = (config.vocab_size, config.hidden_size)
    embedding = reader.dense("model.embed_tokens.weight", shape)
    tied = config.tie_word_embeddings
    head = embedding if tied else reader.dense("lm_head.weight", shape)
    return Decoder(config, embedding, layers, reader.norm("model.norm"), head, options.dtype)


class _Reader:
    """Reads one checkpoint's pieces in the shapes its config promises."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, options: LoadOptions) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._options = options
        self._is_quantized = is_quantized(checkpoint.folder)
        self._shelf = Shelf() if options.device.type == "cpu" else None

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        attention_bias, mlp_bias = self._config.attention_bias, self._config.mlp_bias
        return DecoderLayer(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            qkv=self.linear(index, ("q_proj", "k_proj", "v_proj"), attention_bias),
            o=self.linear(index, ("o_proj",), attention_bias),
            post_attention_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self.linear(index, ("gate_proj", "up_proj"), mlp_bias),
            down=self.linear(index, ("down_proj",), mlp_bias),
        )

    def dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Rounded to bf16 as the base is, then held in the activations' type."""
        tensor = self._checkpoint.read_float(name, shape).to(torch.bfloat16)
        return self._shelved(tensor.to(self._options.device, self._options.dtype))

    def norm(self, name: str) -> Tensor:
        weight = self._checkpoint.read_float(f"{name}.weight", (self._config.hidden_size,))
        return weight.to(torch.bfloat16).to(self._options.device, torch.float32)

    def linear(self, layer: int, modules: tuple[str, ...], has_bias: bool) -> Linear:
        projections, biases = [], []
        column = 0
        for module in modules:
            index = MODULES.index(module)
            shape = self._config.module_shapes[index]
            name = f"{linear_prefix(layer, module)}.{module}"
            projections.append(Projection(index, column, shape[0]))
            column += shape[0]
            if has_bias:
                biases.append(self.dense(f"{name}.bias", (shape[0],)))
        bias = torch.cat(biases) if has_bias else None
        weight = self._placed(self._stacked(layer, modules))
        return Linear(weight, bias, tuple(projections))

    def _stacked(self, layer: int, modules: tuple[str, ...]) -> NF4Weight:
        def make() -> NF4Weight:
            shapes = [self._config.module_shapes[MODULES.index(module)] for module in modules]
            names = [f"{linear_prefix(layer, module)}.{module}" for module in modules]
            return nf4.stack([self._weight(*each) for each in zip(names, shapes, strict=True)])

        cache = self._options.cache
        if cache is None or self._is_quantized:
            return make()
        return cache.weight(f"{layer}.{'+'.join(modules)}", make)

    def _placed(self, weight: NF4Weight) -> BaseWeight:
        placed = weight.to(self._options.device)
        if self._options.form is WeightForm.DENSE:
            return BaseWeight(placed, placed.dequantize().to(self._options.dtype))
        codes, absmax = self._shelved(placed.codes), self._shelved(placed.absmax)
        return BaseWeight(NF4Weight(codes, absmax, placed.code), None)

    def _shelved(self, tensor: Tensor) -> Tensor:
        return tensor if self._shelf is None else self._shelf.place(tensor)

    def _weight(self, name: str, shape: tuple[int, int]) -> NF4Weight:
        if not self._is_quantized:
            full = self._checkpoint.read_float(f"{name}.weight", shape)
            return nf4.quantize(full.to(self._options.device))
        prefix = f"{name}.weight"
        if f"{prefix}.{nf4.QUANT_STATE_KEY}" not in self._checkpoint:
            raise ModelError(
                f"{prefix} is not quantised, though the checkpoint is; give one whose linears all "
                "are in nf4, or the full-precision checkpoint"
            )
        names = [n for n in self._checkpoint.names if n == prefix or n.startswith(prefix + ".")]
        tensors = {n.removeprefix(f"{name}.").removeprefix("weight."): n for n in names}
        try:
            weight = nf4.from_checkpoint(
                {part: self._checkpoint.read(full) for part, full in tensors.items()}
            )
        except (ValueError, KeyError, AssertionError, RuntimeError) as error:
            raise ModelError(f"{name}.weight is not a readable NF4 weight: {error}") from error
        if (weight.out_features, weight.in_features) != shape:
            raise ModelError(f"{name}.weight does not have the shape config.json makes it")
        return weight
