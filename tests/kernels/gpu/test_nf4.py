"""The NF4 kernels on weights that bitsandbytes quantised, against plain fp32, poison all around."""

from dataclasses import replace

import pytest
import torch
from loraplex_kernels.bitsandbytes import functional as bnb
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.nf4 import dequantize, nf4_linear, supports
from loraplex_kernels.gpu.nf4_decode import LEVELS
from loraplex_kernels.nf4 import BLOCK_SIZE, NF4Weight
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.segments import NO_ADAPTER
from torch import Tensor

from tests.kernels.gpu.banks import PoisonedWorkspace, Recorder, framed, with_tiles
from tests.kernels.inputs import LAYERS, POPULARITY, Bank, bank_of, poison

PROJECTIONS = (Projection(2, 0, 72), Projection(0, 72, 41), Projection(1, 113, 24))  # N = 137
LONG = (Projection(1, 5, 150), Projection(2, 155, 30))
FP16 = pytest.param(torch.float16, id="fp16")
BF16 = pytest.param(torch.bfloat16, id="bf16")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
BY_PERMUTE, BY_SHIFT = "sm_80", "interpreter"
"""Targets whose codes are decoded by inline PTX, and without."""


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def weight_of(n: int, k: int, rng: torch.Generator) -> NF4Weight:
    """Between NaN, or bytes that are, on both sides in memory."""
    packed, state = bnb.quantize_4bit(
        torch.randn(n, k, generator=rng) * 0.02, quant_type="nf4", blocksize=BLOCK_SIZE
    )
    codes, absmax = poison(n * k // 2 + 256), poison(4 * (n * k // 64 + 64)).view(torch.float32)
    codes[128:-128] = packed.view(-1)
    absmax[32:-32] = state.absmax
    return NF4Weight(codes[128:-128].view(n, k // 2), absmax[32:-32], state.code)


def dense(weight: NF4Weight) -> Tensor:
    """fp32 [N, K], nothing rounded."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 0xF), dim=-1).long()
    values = weight.code[codes].view(-1, BLOCK_SIZE) * weight.absmax[:, None]
    return values.view(weight.out_features, weight.in_features)


def some(
    num_rows: int, n: int, k: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, NF4Weight]:
    return torch.randn(num_rows, k, generator=rng).to(dtype), weight_of(n, k, rng)


def run(
    x: Tensor,
    weight: NF4Weight,
    lora: LoraInput,
    projections: tuple[Projection, ...],
    target: str = BY_SHIFT,
) -> Tensor:
    x_frame = framed(x)
    out_frame = framed(torch.full((x.shape[0], weight.out_features), torch.nan, dtype=x.dtype))
    nf4_linear(
        launch_now,
        x_frame.inner,
        weight,
        lora,
        1,
        projections,
        out_frame.inner,
        PoisonedWorkspace(),
        target,
    )
    assert x_frame.is_intact()
    assert out_frame.is_intact()
    assert torch.equal(x_frame.inner.view(torch.int16), x.view(torch.int16))
    return out_frame.inner.clone()


def without_adapters(bank: Bank, num_rows: int) -> LoraInput:
    return with_tiles(bank, [NO_ADAPTER] * num_rows)


def error_of(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("target", [BY_PERMUTE, BY_SHIFT])
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(
    ("num_rows", "n", "k"),
    [(1, 137, 192), (7, 64, 512), (16, 1, 64), (33, 200, 64), (64, 130, 128)],
)
def test_every_size_of_tile(
    num_rows: int, n: int, k: int, dtype: torch.dtype, target: str, rng: torch.Generator
) -> None:
    """7 rows by 512: in two slices. A value that is not there would be NaN."""
    x, weight = some(num_rows, n, k, dtype, rng)
    lora = without_adapters(bank_of(dtype, rng, k, PROJECTIONS), num_rows)
    out = run(x, weight, lora, (Projection(0, 0, n),), target)
    assert error_of(out, x.float() @ dense(weight).T) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("k", "dtype", "target"),
    [
        pytest.param(64, torch.float16, BY_SHIFT, id="shift"),
        pytest.param(192, torch.bfloat16, BY_PERMUTE, id="permute"),
        pytest.param(576, torch.bfloat16, BY_SHIFT, id="slices"),
    ],
)
def test_adapters_of_every_popularity(
    k: int, dtype: torch.dtype, target: str, rng: torch.Generator
) -> None:
    """Mixed ranks, absent modules, rows without; 576: 16 rows in two slices, more in one."""
    bank = bank_of(dtype, rng, k, PROJECTIONS)
    weight = weight_of(137, k, rng)
    for popularity, num_rows in (("distinct", 6), ("zipf", 16), ("some_without", 64)):
        slots = POPULARITY[popularity](num_rows, rng)
        x = torch.randn(len(slots), k, generator=rng).to(dtype)
        out = run(x, weight, with_tiles(bank, slots, spare=2), PROJECTIONS, target)
        expected = bank.reference(x.float() @ dense(weight).T, x, slots, 1)
        assert error_of(out, expected) <= TOLERANCE[dtype], (popularity, num_rows)


@pytest.mark.parametrize(
    ("popularity", "num_rows", "k"),
    [("identical", 33, 64), ("uniform", 64, 64), ("unordered", 40, 2048)],
)
def test_more_tiles_than_one_dot_takes(
    popularity: str, num_rows: int, k: int, rng: torch.Generator
) -> None:
    """Several groups of 16 rows; columns 0-4 and 185-189 are of no projection. 2048: in slices."""
    bank = bank_of(torch.float16, rng, k, LONG)
    x, weight = some(num_rows, 190, k, torch.float16, rng)
    slots = POPULARITY[popularity](num_rows, rng)
    out = run(x, weight, with_tiles(bank, slots), LONG)
    expected = bank.reference(x.float() @ dense(weight).T, x, slots, 1)
    assert error_of(out, expected) <= TOLERANCE[torch.float16]


def test_rows_and_columns_without_an_update_stay_the_products(rng: torch.Generator) -> None:
    """Bit for bit, whether adapters are there or not: nothing, not even 0, is added to them."""
    x, weight = some(20, 137, 512, torch.float16, rng)
    bank = bank_of(torch.float16, rng, 512, PROJECTIONS)
    slots = [NO_ADAPTER, *[2] * 9, NO_ADAPTER, *[5] * 7, 4, 0]
    out = run(x, weight, with_tiles(bank, slots), PROJECTIONS)
    plain = run(x, weight, without_adapters(bank, 20), PROJECTIONS)
    for row, slot in enumerate(slots):
        for module, column, width in PROJECTIONS:
            same = torch.equal(
                out[row, column : column + width], plain[row, column : column + width]
            )
            assert same == ((slot, 1, module) not in bank.matrices)


@pytest.mark.parametrize("k", [192, 512])
def test_a_row_does_not_depend_on_its_neighbours(k: int, rng: torch.Generator) -> None:
    """Bit for bit, NaN among them; and the same twice."""
    bank = bank_of(torch.float16, rng, k, PROJECTIONS)
    x, weight = some(12, 137, k, torch.float16, rng)
    slots = [1, 1, 3, NO_ADAPTER, 0, 3, 3, 4, NO_ADAPTER, 1, 2, 0]
    out = run(x, weight, with_tiles(bank, slots), PROJECTIONS)
    assert torch.equal(run(x, weight, with_tiles(bank, slots), PROJECTIONS), out)
    x[1], x[7], x[8] = torch.nan, torch.nan, torch.nan
    beside = run(x, weight, with_tiles(bank, slots), PROJECTIONS)
    for row in (0, 2, 3, 4, 5, 6, 9, 10, 11):
        assert torch.equal(beside[row], out[row])
    for row in (0, 3, 6):
        alone = run(x[row : row + 1], weight, with_tiles(bank, [slots[row]]), PROJECTIONS)
        assert torch.equal(alone[0], out[row])


@pytest.mark.parametrize("k", [192, 512])
def test_one_launch_serves_whatever_the_tensors_say(k: int, rng: torch.Generator) -> None:
    """Recorded with no adapter in the tiles, and replayed as a captured graph is."""
    nobody, everyone = [NO_ADAPTER] * 14, [0, 1, 2, 3, 4, 5, *[1] * 6, NO_ADAPTER, 3]
    bank = bank_of(torch.float16, rng, k, PROJECTIONS)
    x, weight = some(14, 137, k, torch.float16, rng)
    fixed = replace(with_tiles(bank, nobody, spare=14), has_adapters=True)
    out, recorder = torch.empty(14, 137, dtype=torch.float16), Recorder()
    nf4_linear(recorder, x, weight, fixed, 1, PROJECTIONS, out, PoisonedWorkspace(), BY_SHIFT)
    base = x.float() @ dense(weight).T
    assert fixed.tiles is not None
    for slots in (everyone, nobody, [3] * 14):
        tiles = with_tiles(bank, slots, spare=14).tiles
        assert tiles is not None
        fixed.tiles.short.copy_(pad_to(tiles.short, fixed.tiles.short.shape[0]))
        fixed.tiles.starts.copy_(tiles.starts)
        out.fill_(torch.nan)
        recorder.replay()
        expected = bank.reference(base, x, slots, 1)
        assert error_of(out, expected) <= TOLERANCE[torch.float16]


def pad_to(tiles: Tensor, capacity: int) -> Tensor:
    padding = torch.tensor([[NO_ADAPTER, 0, 0]], dtype=torch.int32)
    return torch.cat((tiles, padding.expand(capacity, 3)))[:capacity]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantized_bits_are_bitsandbytes(dtype: torch.dtype, rng: torch.Generator) -> None:
    """In bf16, and in wider types the bf16 values. Odd numbers of rows and of blocks."""
    for n, k in ((7, 192), (130, 64)):
        weight = weight_of(n, k, rng)
        around = torch.full((n * k + 256,), torch.nan, dtype=dtype)
        dequantize(launch_now, weight, around[128:-128].view(n, k))
        assert torch.equal(around[128:-128].view(n, k), weight.dequantize().to(dtype))
        assert around[:128].isnan().all()
        assert around[-128:].isnan().all()


def test_what_is_supported(rng: torch.Generator) -> None:
    weight = weight_of(3, 128, rng)
    assert supports(torch.bfloat16, weight)
    assert supports(torch.float16, weight)
    assert not supports(torch.float32, weight)
    odd = NF4Weight(torch.zeros(4, 48, dtype=torch.uint8), torch.zeros(6), weight.code)
    assert not supports(torch.bfloat16, odd)


def test_the_levels_are_bitsandbytes(rng: torch.Generator) -> None:
    assert torch.equal(torch.tensor(LEVELS), weight_of(1, 64, rng).code)
    assert LAYERS == 2  # so that layer 1 is not the first of the tables
