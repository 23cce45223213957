"""NF4 weights made: from full precision, from a checkpoint in bitsandbytes' format, by stacking."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from loraplex_kernels.nf4 import BLOCK_SIZE, NF4Weight
from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

SETTINGS = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "compress_statistics": False}
QUANT_STATE_KEY = "quant_state.bitsandbytes__nf4"


def quantize(weight: Tensor) -> NF4Weight:
    """Round a `[out, in]` matrix to bf16 and then to NF4."""
    from loraplex_kernels.bitsandbytes import functional as bnb

    codes, state = bnb.quantize_4bit(weight.to(torch.bfloat16).contiguous(), **SETTINGS)
    return NF4Weight(codes.view(weight.shape[0], -1), state.absmax, state.code)


def from_checkpoint(tensors: Mapping[str, Tensor]) -> NF4Weight:
    """A weight as bitsandbytes saved it; nested absmax is un-nested, codes are kept.

    `tensors` maps "weight", "absmax", "quant_map", ... (prefix removed) to what the file holds.
    Raises ValueError for another format, or a part of the wrong length: bitsandbytes reads past it.
    """
    from loraplex_kernels.bitsandbytes import functional as bnb

    parts = {name: tensor for name, tensor in tensors.items() if name != "weight"}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    if state.quant_type != "nf4" or state.blocksize != BLOCK_SIZE:
        raise ValueError(
            f"{state.quant_type} in blocks of {state.blocksize}, not nf4 in blocks of 64"
        )
    codes = tensors["weight"].view(-1).view(torch.uint8)  # bnb_4bit_quant_storage may differ
    _check_lengths(codes, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return NF4Weight(codes.view(state.shape[0], -1), absmax.float(), state.code)


def _check_lengths(codes: Tensor, state: "QuantState") -> None:
    out_features, in_features = state.shape
    num_blocks = out_features * in_features // BLOCK_SIZE
    parts = [
        ("weight", codes, num_blocks * BLOCK_SIZE // 2),
        ("absmax", state.absmax, num_blocks),
        ("quant_map", state.code, 16),
    ]
    if state.nested:
        num_nested = -(-num_blocks // state.state2.blocksize)
        parts.append(("nested_absmax", state.state2.absmax, num_nested))
    for name, tensor, length in parts:
        if tensor.numel() != length:
            raise ValueError(f"{name} holds {tensor.numel()} values, not {length}")


def stack(weights: Sequence[NF4Weight]) -> NF4Weight:
    """Matrices over the same inputs, one above the other, as one weight."""
    if len(weights) == 1:
        return weights[0]
    return NF4Weight(
        torch.cat([w.codes for w in weights]),
        torch.cat([w.absmax for w in weights]),
        weights[0].code,
    )
