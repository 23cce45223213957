"""A model's shapes as its ops see them, for the self-check."""

from pathlib import Path

import torch
from loraplex_kernels.cases import ModelShapes

from loraplex.config import DEFAULT_MODEL
from loraplex.engine.model_runner import block_shape
from loraplex.model.config import ModelConfig, read_model_config
from loraplex.model.hub import resolve_model

DEFAULT_SHAPES = ModelShapes(
    name=DEFAULT_MODEL,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    num_layers=30,
)
"""The built-in model's, so that nothing need be fetched for them."""


def read_shapes(name: str, cache: Path) -> ModelShapes:
    """Of what `--model` names, from its config.json alone; ModelError when that does not work."""
    if name == DEFAULT_MODEL:
        return DEFAULT_SHAPES
    folder = resolve_model(name, cache, files=("config.json",))
    is_folder = Path(name).expanduser().is_dir()
    return shapes_of(folder.resolve().name if is_folder else name, read_model_config(folder))


def shapes_of(name: str, config: ModelConfig) -> ModelShapes:
    """With the arena's block as `serve` makes it, where KV and adapters are of one dtype."""
    block = block_shape(config, torch.bfloat16, torch.bfloat16)
    return ModelShapes(
        name=name,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_layers=config.num_layers,
        block_tokens=block.tokens,
    )
