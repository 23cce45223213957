"""Cosines and sines of the rotary embedding, for every position of the context."""

import math

import torch
from torch import Tensor

from loraplex.model.config import Llama3Rope, Rope


def rotary_tables(rope: Rope, head_dim: int, context_length: int) -> tuple[Tensor, Tensor]:
    """fp32 `[context_length, head_dim / 2]` each."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.llama3 is not None:
        frequencies = _llama3(frequencies, rope.llama3)
    positions = torch.arange(context_length, dtype=torch.int64).float() / rope.linear_factor
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def _llama3(frequencies: Tensor, scaling: Llama3Rope) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    periods = scaling.original_max_position / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((periods - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * keep + frequencies / scaling.factor * (1.0 - keep)
