"""Every op, in torch and compiled, against the plainest fp32 form of its definition."""

import ctypes
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from loraplex_kernels.native import NativeOps
from loraplex_kernels.ops import AttentionInput, Ops, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import NO_ADAPTER
from torch import Tensor

from tests.kernels.inputs import (
    BLOCK_TOKENS,
    DECODES,
    NO_TABLES,
    POPULARITY,
    PROJECTIONS,
    RANKS,
    Bank,
    Heads,
    K,
    N,
    Paged,
    bank_of,
    paged,
)

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture(params=["torch", "native"] if HAS_COMPILER else ["torch"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    library: ctypes.CDLL = request.getfixturevalue("native_library")
    return NativeOps(library)


@pytest.fixture
def native(native_library: ctypes.CDLL) -> NativeOps:
    ops = NativeOps(native_library)
    native_library.loraplex_set_num_threads(2)
    return ops


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Largest error against the largest value."""
    assert actual.dtype == dtype
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert float(error) <= TOLERANCE[dtype], f"error {float(error):.2e}"


@pytest.fixture(params=DTYPES)
def bank(request: pytest.FixtureRequest, ops: Ops, rng: torch.Generator) -> Bank:
    return bank_of(request.param, rng, form=ops.granule_form(request.param))


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_lora(ops: Ops, bank: Bank, rng: torch.Generator, popularity: str, num_rows: int) -> None:
    check_lora(ops, bank, rng, POPULARITY[popularity](num_rows, rng))


def test_lora_of_segments_short_and_long(ops: Ops, bank: Bank, rng: torch.Generator) -> None:
    """Two decode rows, then prefills about the lengths of a chunk and of a panel of rows."""
    check_lora(ops, bank, rng, [1, 4, *[3] * 65, *[1] * 15, -1, *[2] * 16, *[0] * 17])


NARROW = (Projection(0, 0, 5), Projection(1, 5, 13), Projection(2, 18, 3))
WIDE = (Projection(2, 0, 160), Projection(0, 160, 64), Projection(1, 224, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "projections"), [(7, NARROW), (192, WIDE)], ids=["7", "192"])
def test_lora_of_other_sizes(
    ops: Ops,
    dtype: torch.dtype,
    k: int,
    projections: tuple[Projection, ...],
    rng: torch.Generator,
) -> None:
    check_lora(
        ops,
        bank_of(dtype, rng, k, projections, ops.granule_form(dtype)),
        rng,
        [1, 4, *[3] * 21, -1, 0, 2],
    )


def test_lora_keeps_a_sick_adapter_in_its_own_rows(
    ops: Ops, bank: Bank, rng: torch.Generator
) -> None:
    slots = [0, 3, 3, 1, -1, 0]
    for a, b, _ in bank.tables.granules(3, 1, 0):
        sick_a = bank.form.read_a(bank.arena, a, K, bank.dtype).clone()
        sick_b = bank.form.read_b(bank.arena, b, 40, bank.dtype).clone()
        sick_a[0, 5], sick_b[2] = torch.nan, torch.inf
        bank.form.write_a(bank.arena, a, sick_a)
        bank.form.write_b(bank.arena, b, sick_b)
    x = torch.randn(len(slots), K, generator=rng).to(bank.dtype)
    x[5] = torch.inf
    y = torch.zeros(len(slots), N, dtype=bank.dtype)
    ops.lora_(y, x, bank.lora_input(slots), 1, PROJECTIONS)
    sick = (~y.isfinite()).any(1)
    assert sick.tolist() == [False, True, True, False, False, True]


def check_lora(ops: Ops, bank: Bank, rng: torch.Generator, slots: list[int]) -> None:
    k = next(iter(bank.matrices.values()))[0].shape[1]
    x = torch.randn(len(slots), k, generator=rng).to(bank.dtype)
    num_outputs = sum(projection.width for projection in bank.projections)
    y = torch.randn(len(slots), num_outputs, generator=rng).to(bank.dtype)
    before = y.clone()
    lora = bank.lora_input(slots)
    ops.lora_(y, x, lora, 1, bank.projections)
    assert_close(y, bank.reference(before, x, slots, 1), bank.dtype)
    for row, slot in enumerate(slots):
        for module, column, width in bank.projections:
            if slot == NO_ADAPTER or RANKS[slot][module] == 0:
                columns = slice(column, column + width)
                assert torch.equal(y[row, columns], before[row, columns])


@pytest.mark.parametrize("num_rows", [24, 96])
def test_lora_in_bf16_rounds_as_little_as_plain_products(
    ops: Ops, rng: torch.Generator, num_rows: int
) -> None:
    bank = bank_of(torch.bfloat16, rng, form=ops.granule_form(torch.bfloat16))
    x = torch.randn(num_rows, K, generator=rng).to(bank.dtype)
    y = torch.zeros(num_rows, N, dtype=bank.dtype)
    slots = [3] * num_rows  # rank 64: four granules
    expected = bank.reference(y, x, slots, 1)
    plain = torch.zeros_like(y)
    for module, column, width in PROJECTIONS:
        a, b, scale = bank.matrices[3, 1, module]
        plain[:, column : column + width] = (x @ a.to(x.dtype).T) @ b.to(x.dtype).T * scale
    ops.lora_(y, x, bank.lora_input(slots), 1, PROJECTIONS)
    error, plain_error = (y.float() - expected).norm(), (plain.float() - expected).norm()
    assert error <= 1.25 * plain_error


def test_lora_of_one_projection_writes_its_columns_only(
    ops: Ops, bank: Bank, rng: torch.Generator
) -> None:
    x = torch.randn(5, K, generator=rng).to(bank.dtype)
    y = torch.full((5, N), torch.nan, dtype=bank.dtype)
    projection = PROJECTIONS[1]
    y[:, 72:112] = 0.0
    ops.lora_(y, x, bank.lora_input([3] * 5), 0, (projection,))
    assert y[:, 72:112].isfinite().all()
    assert y[:, :72].isnan().all()
    assert y[:, 112:].isnan().all()


@pytest.mark.parametrize("popularity", POPULARITY)
def test_output_scale(ops: Ops, bank: Bank, rng: torch.Generator, popularity: str) -> None:
    """Between columns that are nobody's; what has no scale keeps its bits, a NaN's too."""
    slots = POPULARITY[popularity](33, rng)
    whole = torch.full((len(slots), N + 9), torch.nan, dtype=bank.dtype)
    y = whole[:, 2 : N + 2]
    y.copy_(torch.randn(len(slots), N, generator=rng))
    expected = bank.scaled(y, slots, 1)
    same = expected == y.float()
    before = y.clone()
    ops.scale_output_(y, bank.lora_input(slots), 1, PROJECTIONS)
    assert torch.equal(y, expected.to(bank.dtype))
    assert torch.equal(y[same], before[same])
    assert whole[:, :2].isnan().all()
    assert whole[:, N + 2 :].isnan().all()
    ops.scale_output_(y, bank.lora_input(slots), 0, PROJECTIONS)  # no adapter scales layer 0
    assert torch.equal(y, expected.to(bank.dtype))


HEADS = [
    pytest.param(Heads(3, 3, 64), id="mha64"),
    pytest.param(Heads(9, 3, 64), id="gqa3x64"),
    pytest.param(Heads(8, 2, 80), id="gqa4x80"),
    pytest.param(Heads(4, 1, 128), id="mqa4x128"),
    pytest.param(Heads(2, 2, 16), id="mha16"),
    pytest.param(Heads(3, 1, 24), id="mqa3x24"),
]


def attention_reference(data: Paged, heads: Heads, window: int = 10**6) -> Tensor:
    q = data.qkv.view(data.qkv.shape[0], -1, heads.dim).float()
    out = torch.empty(q.shape[0], heads.query, heads.dim)
    for index, (k, v) in enumerate(zip(data.k, data.v, strict=True)):
        lo, hi = data.where.query_starts[index], data.where.query_starts[index + 1]
        for row in range(lo, hi):
            seen = data.where.context_lens[index] - (hi - 1 - row)
            for head in range(heads.query):
                group = head * heads.kv // heads.query
                keys, values = k[max(0, seen - window) : seen], v[max(0, seen - window) : seen]
                scores = keys[:, group].float() @ q[row, head] / math.sqrt(heads.dim)
                out[row, head] = torch.softmax(scores, 0) @ values[:, group].float()
    return out.flatten(1)


def attend(
    ops: Ops, data: Paged, qkv: Tensor, where: AttentionInput, window: int | None = None
) -> Tensor:
    _, num_kv_heads, _, head_dim = data.k_cache.shape
    width = qkv.shape[1] - 2 * num_kv_heads * head_dim
    out = torch.full((qkv.shape[0], width), torch.nan, dtype=qkv.dtype)
    ops.attention(qkv, data.k_cache, data.v_cache, where, out, window)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(ops: Ops, dtype: torch.dtype, heads: Heads, rng: torch.Generator) -> None:
    data = paged(heads, dtype, rng)
    out = attend(ops, data, data.qkv, data.where)
    assert_close(out, attention_reference(data, heads), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 17, 1000])
def test_attention_in_a_window(
    ops: Ops, dtype: torch.dtype, window: int, rng: torch.Generator
) -> None:
    heads = Heads(9, 3, 64)
    data = paged(heads, dtype, rng)
    out = attend(ops, data, data.qkv, data.where, window)
    assert_close(out, attention_reference(data, heads, window), dtype)


def test_attention_gives_zeros_for_padding(ops: Ops, rng: torch.Generator) -> None:
    data = paged(Heads(9, 3, 64), torch.bfloat16, rng)
    where = AttentionInput(1, [0, 1], [0], torch.zeros(1, dtype=torch.int32), *NO_TABLES)
    assert not attend(ops, data, data.qkv[:1], where).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_keeps_a_nan_in_its_own_rows(
    ops: Ops, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """A sequence whose keys overflowed is found by its logits; the others must not notice."""
    heads = Heads(9, 3, 64)
    data = paged(heads, dtype, rng)
    sick_decode, sick_prefill = 5, len(DECODES) + 2
    for index in (sick_decode, sick_prefill):
        data.k_cache[int(data.where.block_tables[index, 0]), :, 3, 0] = torch.nan
    out = attend(ops, data, data.qkv, data.where)
    starts = data.where.query_starts
    sick = torch.zeros(out.shape[0], dtype=torch.bool)
    sick[sick_decode] = True
    sick[starts[sick_prefill] + 3 : starts[sick_prefill + 1]] = True  # those that see token 3
    assert torch.equal(out.isnan().any(1), sick)


# The rest.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_rotary_and_cache(ops: Ops, dtype: torch.dtype, heads: Heads, rng: torch.Generator) -> None:
    num_tokens, num_blocks = 11, 6
    qkv = torch.randn(num_tokens, heads.query + 2 * heads.kv, heads.dim, generator=rng).to(dtype)
    angles = torch.rand(num_tokens, heads.dim // 2, generator=rng) * 100
    cache = torch.full(
        (num_blocks, 2, 2, heads.kv, BLOCK_TOKENS, heads.dim), torch.nan, dtype=dtype
    )
    where = torch.randperm(num_blocks * BLOCK_TOKENS, generator=rng)[:num_tokens]
    where[3] = -1  # padding
    before = qkv.clone()
    flat = qkv.flatten(1)
    ops.rotary_and_cache(flat, angles.cos(), angles.sin(), cache[:, 1, 0], cache[:, 1, 1], where)

    after = flat.view(num_tokens, -1, heads.dim)
    low, high = before[:, : -heads.kv].float().chunk(2, -1)
    turned = torch.complex(low, high) * torch.polar(torch.ones(()), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert_close(after[:, : -heads.kv], expected, dtype)
    assert torch.equal(after[:, -heads.kv :], before[:, -heads.kv :])
    for token, place in enumerate(where.tolist()):
        if place < 0:
            continue
        block, offset = divmod(place, BLOCK_TOKENS)
        cached = cache[block, 1, :, :, offset].clone()  # [k or v, kv_heads, dim]
        assert torch.equal(cached.flatten(0, 1), after[token, heads.query :])
        cache[block, 1, :, :, offset] = torch.nan
    assert cache.isnan().all()


def normed(
    ops: Ops, residual: Tensor, delta: Tensor | None, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    out = torch.full(residual.shape, torch.nan, dtype=dtype)
    ops.add_rms_norm(residual, delta, weight, 1e-5, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (5, 576)])
def test_add_rms_norm(
    ops: Ops, dtype: torch.dtype, has_delta: bool, shape: tuple[int, int], rng: torch.Generator
) -> None:
    residual = torch.randn(shape, generator=rng) * 10
    residual[0] *= 1000
    residual[-1] = 0.0
    delta = torch.randn(shape, generator=rng).to(dtype) if has_delta else None
    weight = torch.randn(shape[1], generator=rng)
    summed = residual if delta is None else residual + delta.float()
    mean = summed.double().square().mean(-1, keepdim=True)
    expected = (summed.double() / (mean + 1e-5).sqrt()).float() * weight

    changed = residual.clone()
    out = normed(ops, changed, delta, weight, dtype)
    assert torch.equal(changed, summed)
    for row in range(shape[0]):
        if expected[row].any():
            assert_close(out[row], expected[row], dtype)
        else:
            assert not out[row].any()


def gated(ops: Ops, gate_up: Tensor) -> Tensor:
    out = torch.full((gate_up.shape[0], gate_up.shape[1] // 2), torch.nan, dtype=gate_up.dtype)
    ops.silu_mul(gate_up, out)
    return out


GATES = (-3e38, -1e30, -1e4, -104, -89, -88, -20, -1, -1e-30, 0, 1e-30, 0.5, 20, 88, 104, 1e30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(ops: Ops, dtype: torch.dtype, rng: torch.Generator) -> None:
    gate = torch.cat((torch.tensor(GATES), torch.randn(85, generator=rng) * 5)).to(dtype)
    up = torch.randn(3, gate.numel(), generator=rng).to(dtype)
    out = gated(ops, torch.cat((gate.expand_as(up), up), 1))
    assert out.dtype == dtype
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    error = (out.double() - expected).abs()
    assert (error <= TOLERANCE[dtype] * expected.abs() + 1e-30).all()


def test_silu_mul_keeps_nan(ops: Ops) -> None:
    gate_up = torch.ones(2, 2 * 99)
    gate_up[0, 7] = gate_up[1, 99 + 98] = torch.nan
    nan = torch.zeros(2, 99, dtype=torch.bool)
    nan[0, 7] = nan[1, 98] = True
    assert torch.equal(gated(ops, gate_up).isnan(), nan)


# A row's result depends on that row alone, bit for bit; so a request answers the same in any batch.


def alone(data: Paged, index: int) -> tuple[Tensor, AttentionInput]:
    where = AttentionInput(
        num_decode=1,
        query_starts=[0, 1],
        context_lens=[data.where.context_lens[index]],
        context_table=data.where.context_table[index : index + 1],
        block_tables=data.where.block_tables[index : index + 1],
        query_start_table=None,
        query_tiles=None,
    )
    return data.qkv[index : index + 1], where


def rows(tensor: Tensor) -> Iterator[Tensor]:
    return (tensor[row : row + 1] for row in range(tensor.shape[0]))


# Contexts and queries about the sizes in which the compiled form takes keys: 32, 128 and 512.
LONG_DECODES = [31, 128, 129, 512, 513, 1100]
LONG_PREFILLS = [(514, 2), (530, 9), (1030, 9), (300, 300), (700, 130)]

if HAS_COMPILER:

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("block_tokens", "window"), [(16, None), (32, 200), (48, None), (8, 600)]
    )
    def test_attention_over_long_contexts(
        native: NativeOps,
        dtype: torch.dtype,
        block_tokens: int,
        window: int | None,
        rng: torch.Generator,
    ) -> None:
        """Against the torch form in fp32, which the tests above hold to the definition."""
        data = paged(Heads(6, 2, 32), dtype, rng, block_tokens, LONG_DECODES, LONG_PREFILLS)
        wide = replace(
            data, qkv=data.qkv.float(), k_cache=data.k_cache.float(), v_cache=data.v_cache.float()
        )
        out = attend(native, data, data.qkv, data.where, window)
        assert_close(out, attend(TorchOps(), wide, wide.qkv, wide.where, window), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_native_lora_row_by_row(
        native: NativeOps, dtype: torch.dtype, rng: torch.Generator
    ) -> None:
        """Segments about the sizes at which few rows are many, and a tile is full."""
        bank = bank_of(dtype, rng, form=native.granule_form(dtype))
        slots = [*POPULARITY["zipf"](41, rng), *[3] * 4, -1, *[1] * 5, *[4] * 16, *[3] * 17]
        x = torch.randn(len(slots), K, generator=rng).to(bank.dtype)
        y = torch.randn(len(slots), N, generator=rng).to(bank.dtype)
        single = [row.clone() for row in rows(y)]
        native.lora_(y, x, bank.lora_input(slots), 0, PROJECTIONS)
        for slot, x_row, y_row in zip(slots, rows(x), single, strict=True):
            native.lora_(y_row, x_row, bank.lora_input([slot]), 0, PROJECTIONS)
        assert torch.equal(torch.cat(single), y)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_native_decode_attention_row_by_row(
        native: NativeOps, dtype: torch.dtype, rng: torch.Generator
    ) -> None:
        data = paged(Heads(9, 3, 64), dtype, rng, decodes=[*DECODES, 513, 1100])
        together = attend(native, data, data.qkv, data.where)
        for index in range(data.where.num_decode):
            qkv, where = alone(data, index)
            single = attend(native, data, qkv, where)
            assert torch.equal(single[0], together[index])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(4, 1, 32), Heads(2, 2, 64)])
    def test_native_attention_of_a_prefill_row_by_row(
        native: NativeOps, dtype: torch.dtype, heads: Heads, rng: torch.Generator
    ) -> None:
        """A token decoded, verified among drafts or prefilled: the same bits.

        From four heads and queries on a key/value head to five, vectors give way to tiles.
        """
        context, queries = 1030, 60
        data = paged(heads, dtype, rng, decodes=[], prefills=[(context, queries)])
        together = attend(native, data, data.qkv, data.where)
        for first, count in [(0, 1), (7, 5), (20, 1), (33, 4), (34, 2), (53, 7), (59, 1)]:
            seen = context - queries + first + count
            where = replace(
                data.where,
                num_decode=int(count == 1),
                query_starts=[0, count],
                context_lens=[seen],
                context_table=torch.tensor([seen], dtype=torch.int32),
            )
            some = attend(native, data, data.qkv[first : first + count], where)
            assert torch.equal(some, together[first : first + count])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_native_side_work_row_by_row(
        native: NativeOps, dtype: torch.dtype, rng: torch.Generator
    ) -> None:
        residual = torch.randn(9, 100, generator=rng)
        delta = torch.randn(9, 100, generator=rng).to(dtype)
        weight = torch.randn(100, generator=rng)
        single = [
            normed(native, r.clone(), d, weight, dtype)
            for r, d in zip(rows(residual), rows(delta), strict=True)
        ]
        assert torch.equal(torch.cat(single), normed(native, residual, delta, weight, dtype))
        single = [gated(native, row) for row in rows(delta)]
        assert torch.equal(torch.cat(single), gated(native, delta))
