"""The product with 4-bit codes: their exact values, any shape, a row's own result."""

import ctypes

import pytest
import torch
from loraplex_kernels.native import NativeOps
from loraplex_kernels.nf4 import BaseWeight, NF4Weight
from torch import Tensor

from tests.kernels.tiles import HAS_COMPILER, HAS_TILES

SHAPES = [(2, 64), (18, 128), (50, 192), (64, 64), (96, 320), (130, 576)]
ROWS = [*range(1, 41), 300]


def weight_of(n: int, k: int, rng: torch.Generator) -> NF4Weight:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=rng)
    absmax = torch.rand(n * k // 64, generator=rng) + 0.1
    code = torch.linspace(-1.0, 1.0, 16) + 0.01 * torch.rand(16, generator=rng)
    return NF4Weight(codes, absmax, code)


def product(ops: NativeOps, x: Tensor, weight: NF4Weight) -> Tensor:
    out = torch.full((len(x), weight.out_features), torch.nan, dtype=x.dtype)
    ops.base_linear(x, BaseWeight(weight, None), out)
    return out


if HAS_COMPILER:

    @pytest.fixture
    def ops(native_library: ctypes.CDLL) -> NativeOps:
        return NativeOps(native_library)

    def test_codes_are_multiplied_where_there_are_tiles(ops: NativeOps) -> None:
        assert ops.multiplies_codes == HAS_TILES


if HAS_TILES:

    @pytest.mark.parametrize(("n", "k"), SHAPES)
    def test_the_weights_have_their_very_values(
        ops: NativeOps, rng: torch.Generator, n: int, k: int
    ) -> None:
        weight = weight_of(n, k, rng)
        assert torch.equal(
            product(ops, torch.eye(k, dtype=torch.bfloat16), weight), weight.dequantize().T
        )

    @pytest.mark.parametrize(("n", "k"), SHAPES)
    def test_the_product_in_fp32_rounded_once(
        ops: NativeOps, rng: torch.Generator, n: int, k: int
    ) -> None:
        weight = weight_of(n, k, rng)
        x = torch.randn(max(ROWS), k, generator=rng).bfloat16()
        expected = x.double() @ weight.dequantize().double().T
        whole = product(ops, x, weight)
        error = (whole.double() - expected).abs()
        # Half a unit in bf16's last place, and what fp32 sums of k terms may be off.
        assert bool((error <= expected.abs() * 2**-8 + 1e-5 * expected.abs().max()).all())
        for rows in ROWS:
            assert torch.equal(product(ops, x[:rows], weight), whole[:rows])

    def test_several_threads_change_nothing(
        native_library: ctypes.CDLL, rng: torch.Generator
    ) -> None:
        weight = weight_of(1000, 576, rng)
        x = torch.randn(33, 576, generator=rng).bfloat16()
        single = product(NativeOps(native_library), x, weight)
        torch.set_num_threads(3)
        try:
            assert torch.equal(product(NativeOps(native_library), x, weight), single)
        finally:
            torch.set_num_threads(1)
            NativeOps(native_library)
