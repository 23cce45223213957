"""The repaired interpreter's bf16 against torch's, its PTX against plain integers; overflows."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from loraplex_kernels.gpu.interpreter import repair, run_ptx
from torch import Tensor
from triton.runtime import interpreter

SIZE = 1024
BF16, FP32, FP16, INT32 = torch.bfloat16, torch.float32, torch.float16, torch.int32


@triton.jit
def _arithmetic(x, y, out, compared, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + SIZE + i, a - b)
    tl.store(out + 2 * SIZE + i, a * b)
    tl.store(out + 3 * SIZE + i, -a)
    tl.store(out + 4 * SIZE + i, tl.abs(a))
    tl.store(out + 5 * SIZE + i, tl.where(a < b, a, b))
    tl.store(out + 6 * SIZE + i, tl.maximum(a, b))
    tl.store(out + 7 * SIZE + i, a + 0.3)
    tl.store(out + 8 * SIZE + i, tl.fma(a, b, a))
    tl.store(compared + i, a < b)
    tl.store(compared + SIZE + i, a >= b)
    tl.store(compared + 2 * SIZE + i, a == b)
    tl.store(compared + 3 * SIZE + i, a != b)


@triton.jit
def _copy(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _reduce(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(out + row, tl.sum(values, 1))
    tl.store(out + ROWS + row, tl.max(values, 1))
    tl.store(out + 2 * ROWS + row, tl.min(values, 1))
    tl.store(out + 3 * ROWS + row, tl.argmax(values, 1))
    tl.store(out + 4 * ROWS, tl.sum(values))
    running = tl.cumsum(values, 1)
    tl.store(out + 5 * ROWS + row[:, None] * COLUMNS + column[None, :], running)


@triton.jit
def _dot(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a_tile = tl.load(a + m[:, None] * K + k[None, :])
    b_tile = tl.load(b + k[:, None] * N + n[None, :])
    acc = tl.full((M, N), 0.5, tl.float32)
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(a_tile, b_tile, acc))


@triton.jit
def _swap_nibbles_asm(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    value = tl.load(x + i)
    high, low = tl.inline_asm_elementwise(
        "{ shr.b32 $0, $2, 4; and.b32 $0, $0, 0x0f0f0f0f; and.b32 $1, $2, 0x0f0f0f0f; }",
        "=r,=r,r",
        [value],
        dtype=(tl.uint8, tl.uint8),
        is_pure=True,
        pack=4,
    )
    tl.store(out + i, low * 16 + high)


def some(seed: int, dtype: torch.dtype = BF16) -> Tensor:
    """Magnitudes from 1e-6 to 1e6, both signs."""
    rng = torch.Generator().manual_seed(seed)
    exponents = torch.rand(SIZE, generator=rng) * 12 - 6
    return (torch.randn(SIZE, generator=rng) * 10**exponents).to(dtype)


def test_arithmetic_and_comparisons_are_torchs() -> None:
    a, b = some(0), some(1)
    b[::7] = a[::7]
    a[5], b[6] = torch.inf, -torch.inf
    out, compared = torch.empty(9, SIZE, dtype=BF16), torch.empty(4, SIZE, dtype=torch.bool)
    _arithmetic[(1,)](a, b, out, compared, SIZE=SIZE)
    expected = [a + b, a - b, a * b, -a, a.abs(), torch.minimum(a, b), torch.maximum(a, b)]
    expected += [(a.float() + torch.tensor(0.3, dtype=BF16).float()).to(BF16)]
    expected += [(a.double() * b.double() + a.double()).to(BF16)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(compared, torch.stack([a < b, a >= b, a == b, a != b]))


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(SIZE, dtype=dtype)
    _copy[(1,)](values, out, SIZE=SIZE)
    return out


def test_fp32_is_rounded_to_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31, (SIZE,), generator=torch.Generator().manual_seed(2))
    bits[:256] = bits[:256] & ~0xFFFF | 0x8000  # ties
    values = bits.to(INT32).view(FP32)
    values[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -1e-45])
    out = cast(values, BF16)
    assert torch.equal(out.isnan(), values.isnan())
    kept = ~values.isnan()
    assert torch.equal(out[kept].view(torch.int16), values[kept].to(BF16).view(torch.int16))


@pytest.mark.parametrize(
    ("source", "target"),
    [(BF16, FP32), (BF16, FP16), (BF16, INT32), (FP16, BF16), (INT32, BF16), (BF16, BF16)],
)
def test_casts_are_torchs(source: torch.dtype, target: torch.dtype) -> None:
    values = some(3, FP32).clamp(-60000, 60000).to(source)
    assert torch.equal(cast(values, target), values.to(target))


def test_reductions_are_rounded_once() -> None:
    x = some(4).view(16, 64)
    out = torch.full((16 * 5 + 16 * 64,), torch.nan)
    _reduce[(1,)](x, out, ROWS=16, COLUMNS=64)
    sums, highest, lowest, where, whole = out[:80].view(5, 16)
    biggest = x.float().abs().max()
    assert (sums - x.float().sum(1)).abs().max() <= biggest * 2**-8
    assert torch.equal(sums, sums.to(BF16).float())
    assert torch.equal(highest, x.max(1).values.float())
    assert torch.equal(lowest, x.min(1).values.float())
    assert torch.equal(where.long(), x.max(1).indices)
    assert (whole[0] - x.float().sum()).abs() <= x.float().sum().abs() * 2**-8
    running = x.float().cumsum(1)
    assert (out[80:].view(16, 64) - running).abs().max() <= running.abs().max() * 2**-8


def test_a_dot_multiplies_values_and_sums_in_fp32() -> None:
    rng = torch.Generator().manual_seed(5)
    a = torch.randn(16, 64, generator=rng).to(BF16)
    b = torch.randn(64, 32, generator=rng).to(BF16)
    out = torch.empty(16, 32)
    _dot[(1,)](a, b, out, M=16, N=32, K=64)
    torch.testing.assert_close(out, a.float() @ b.float() + 0.5, rtol=1e-5, atol=1e-5)


def test_other_types_are_left_alone() -> None:
    a, b = some(6, FP32), some(7, FP32)
    out, compared = torch.empty(9, SIZE), torch.empty(4, SIZE, dtype=torch.bool)
    _arithmetic[(1,)](a, b, out, compared, SIZE=SIZE)
    assert torch.equal(out[:3], torch.stack([a + b, a - b, a * b]))


@pytest.mark.parametrize(
    ("operation", "a", "b"), [("add", 2**31 - 1, 1), ("sub", -(2**31), 1), ("mul", 2**16, 2**15)]
)
def test_an_overflow_is_found(operation: str, a: int, b: int) -> None:
    left, right = torch.zeros(2, SIZE, dtype=INT32)
    left[7], right[7] = a, b
    out, compared = torch.empty(9, SIZE, dtype=INT32), torch.empty(4, SIZE, dtype=torch.bool)
    with pytest.raises(interpreter.InterpreterError, match=f"int32 overflow .* {operation}"):
        _arithmetic[(1,)](left, right, out, compared, SIZE=SIZE)


def test_repair_is_done_once() -> None:
    def state() -> list[object]:
        semantic = interpreter.interpreter_semantic
        owners = (interpreter.InterpreterBuilder, interpreter.ReduceOps, semantic)
        return [interpreter._patch_lang, *(dict(vars(owner)) for owner in owners)]

    before = state()
    repair()
    assert state() == before


def test_inline_assembly_gets_packs_of_neighbours() -> None:
    x = torch.randint(0, 256, (SIZE,), generator=torch.Generator().manual_seed(8)).to(torch.uint8)
    out = torch.empty_like(x)
    _swap_nibbles_asm[(1,)](x, out, SIZE=SIZE)
    assert torch.equal(out, (x << 4) | (x >> 4))


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("and.b32 $0, $1, $3", 0x80203000),
        ("shr.b32 $0, $1, 8", 0x00802233),
        ("mov.b32 $0, 0x1f", 0x0000001F),
        ("prmt.b32 $0, $1, $2, 0x7410", 0xFFFF3344),
        ("prmt.b32 $0, $1, $2, 0xb3c8", 0xFF80FF00),  # with the sign of bytes 3, 4 and 0
        ("lop3.b32 $0, $1, $2, $3, 0xca", 0xF0F2F3FF),  # $1 ? $2 : $3
        ("lop3.b32 $0, $1, $2, $3, 0x80", 0x80203000),  # all three
    ],
)
def test_ptx_instructions(statement: str, expected: int) -> None:
    registers = [np.array([word], dtype=np.uint32) for word in (0x80223344, 0xFFFFFFFF, 0xF0F0F0BB)]
    (result,) = run_ptx("{ .reg .b32 t; " + statement + "; }", 1, registers)
    assert f"{int(np.ravel(result)[0]):08x}" == f"{expected:08x}"


def test_unknown_ptx_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"mul\.lo\.s32"):
        run_ptx("mul.lo.s32 $0, $1, $1;", 1, [np.ones(1, dtype=np.uint32)])
