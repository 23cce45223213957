"""NF4 as bitsandbytes has it: made, stacked, and taken from its checkpoints without a change."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.model import nf4
from loraplex_kernels.bitsandbytes import functional as bnb
from torch import Tensor


def matrix(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator) / 10


def checkpoint_of(weight: Tensor, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    """What bitsandbytes saves of a weight, and the state it keeps itself."""
    options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": False} | changes
    codes, state = bnb.quantize_4bit(weight, **options)
    return {"weight": codes, **state.as_dict(packed=True)}, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_rounds_to_bf16_and_is_bitsandbytes(dtype: torch.dtype) -> None:
    weight = matrix(48, 128).to(dtype)
    ours = nf4.quantize(weight)
    codes, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
    assert (ours.out_features, ours.in_features) == (48, 128)
    assert torch.equal(ours.codes.view(-1, 1), codes)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(codes, state))


def test_a_matrix_that_is_a_view_is_quantised_by_its_rows() -> None:
    weight = matrix(128, 64)
    assert torch.equal(nf4.quantize(weight.T).codes, nf4.quantize(weight.T.contiguous()).codes)


def test_a_value_is_its_level_times_its_blocks_absmax() -> None:
    weight = nf4.quantize(matrix(6, 192))
    levels = torch.stack((weight.codes >> 4, weight.codes & 15), dim=-1).view(-1, 64)
    expected = weight.code[levels.int()] * weight.absmax[:, None]
    values = weight.dequantize()
    assert values.dtype == torch.bfloat16
    assert torch.equal(values, expected.bfloat16().view(6, 192))


def test_zeros_stay_zeros() -> None:
    assert torch.equal(nf4.quantize(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))


@settings(deadline=None, max_examples=25)
@given(
    heights=st.lists(st.integers(1, 40).map(lambda n: 2 * n), min_size=1, max_size=4),
    blocks=st.integers(1, 4),
)
def test_stacking_changes_no_value(heights: list[int], blocks: int) -> None:
    parts = [nf4.quantize(matrix(n, 64 * blocks, seed)) for seed, n in enumerate(heights)]
    stacked = nf4.stack(parts)
    assert (stacked.out_features, stacked.in_features) == (sum(heights), 64 * blocks)
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_checkpoint_keeps_its_codes(nested: bool, storage: torch.dtype) -> None:
    tensors, state = checkpoint_of(
        matrix(320, 128).bfloat16(), compress_statistics=nested, quant_storage=storage
    )
    weight = nf4.from_checkpoint(tensors)
    assert weight.codes.dtype == torch.uint8
    assert torch.equal(weight.codes.view(-1), tensors["weight"].view(-1).view(torch.uint8))
    assert weight.absmax.dtype == torch.float32
    assert torch.equal(weight.dequantize(), bnb.dequantize_4bit(tensors["weight"], state))
    if not nested:
        assert torch.equal(weight.absmax, state.absmax)


def test_a_checkpoint_in_float16_is_dequantised_to_bf16() -> None:
    tensors, state = checkpoint_of(matrix(16, 128).half())
    values = nf4.from_checkpoint(tensors).dequantize()
    assert values.dtype == torch.bfloat16
    state.dtype = torch.float32
    assert torch.equal(values, bnb.dequantize_4bit(tensors["weight"], state).bfloat16())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"quant_type": "fp4"}, "fp4 in blocks of 64"), ({"blocksize": 128}, "nf4 in blocks of 128")],
)
def test_other_formats_are_refused(change: dict[str, Any], named: str) -> None:
    tensors, _ = checkpoint_of(matrix(16, 128).bfloat16(), **change)
    with pytest.raises(ValueError, match=named):
        nf4.from_checkpoint(tensors)


@pytest.mark.parametrize(
    ("part", "nested"),
    [
        ("weight", False),
        ("absmax", False),
        ("absmax", True),
        ("quant_map", False),
        ("nested_absmax", True),
    ],
)
def test_a_part_of_the_wrong_length_is_refused(part: str, nested: bool) -> None:
    tensors, _ = checkpoint_of(matrix(320, 128).bfloat16(), compress_statistics=nested)
    tensors[part] = tensors[part].view(-1)[:-1].clone()
    with pytest.raises(ValueError, match=r"holds \d+ values, not \d+"):
        nf4.from_checkpoint(tensors)
