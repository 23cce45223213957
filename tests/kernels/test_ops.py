"""Every op, in torch and compiled, against the plainest fp32 form of its definition.

The arena and the cache are NaN wherever an op has no business, so that a read too far shows.
"""

import ctypes
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from loraplex_kernels.native import NativeOps
from loraplex_kernels.native.ops import LONG_SEGMENT
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import NO_ADAPTER, segments_of
from loraplex_kernels.tables import GRANULE_RANK, AdapterTables, Granule, view
from torch import Tensor

CPU = torch.device("cpu")
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
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Largest error against the largest value."""
    assert actual.dtype == dtype
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert float(error) <= TOLERANCE[dtype], f"error {float(error):.2e}"


def poison(num_bytes: int) -> Tensor:
    """Bytes that are NaN in every dtype."""
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


# LoRA: 6 adapters over 2 layers of 3 modules that stack into one linear.

K = 88
PROJECTIONS = (Projection(2, 0, 72), Projection(0, 72, 40), Projection(1, 112, 24))
N = 136
LAYERS, MODULES = 2, 3
RANKS = (  # of each slot's modules; 0: not adapted
    (16, 16, 16),
    (1, 17, 64),
    (0, 8, 0),
    (64, 64, 64),
    (4, 0, 33),
    (0, 0, 0),
)


@dataclass(frozen=True)
class Bank:
    """Adapters in a poisoned arena, and their plain matrices."""

    arena: Tensor
    tables: AdapterTables
    dtype: torch.dtype
    matrices: dict[tuple[int, int, int], tuple[Tensor, Tensor, float]]  # A [r, K], B [n, r], scale

    def lora_input(self, slots: list[int]) -> LoraInput:
        segments = segments_of(slots)
        table = torch.tensor(segments, dtype=torch.int32).view(-1, 3)
        return LoraInput(self.arena, self.dtype, self.tables, segments, table)

    def reference(self, y: Tensor, x: Tensor, slots: list[int], layer: int) -> Tensor:
        out = y.float().clone()
        for row, slot in enumerate(slots):
            for module, column, width in PROJECTIONS:
                if (slot, layer, module) in self.matrices:
                    a, b, scale = self.matrices[slot, layer, module]
                    out[row, column : column + width] += scale * (b @ (a @ x[row].float()))
        return out


@pytest.fixture(params=DTYPES)
def bank(request: pytest.FixtureRequest, rng: torch.Generator) -> Bank:
    return bank_of(request.param, rng)


def bank_of(dtype: torch.dtype, rng: torch.Generator) -> Bank:
    arena = poison(4 << 20)
    tables = AdapterTables(len(RANKS), LAYERS, MODULES, 64, CPU)
    places = iter((torch.randperm(500, generator=rng) * 8192).tolist())
    matrices = {}
    for slot, ranks in enumerate(RANKS):
        granules: list[Granule] = []
        for layer in range(LAYERS):
            for module, _, width in PROJECTIONS:
                rank = ranks[module]
                if rank == 0:
                    continue
                a = torch.randn(rank, K, generator=rng).to(dtype).float()
                b = torch.randn(width, rank, generator=rng).to(dtype).float()
                scale = 0.1 + slot / 4
                matrices[slot, layer, module] = (a, b, scale)
                for part in range(-(-rank // GRANULE_RANK)):
                    a_at, b_at = next(places), next(places)
                    lay(arena, a_at, a, part, dtype)
                    lay(arena, b_at, b.T, part, dtype)
                    granules.append(Granule(layer, module, part, a_at, b_at, scale))
        tables.write(slot, granules)
    return Bank(arena, tables, dtype, matrices)


def lay(arena: Tensor, offset: int, matrix: Tensor, part: int, dtype: torch.dtype) -> None:
    rows = matrix[part * GRANULE_RANK : (part + 1) * GRANULE_RANK]
    target = view(arena, offset, GRANULE_RANK, matrix.shape[1], dtype)
    target.zero_()
    target[: rows.shape[0]] = rows.to(dtype)


def zipf(num_rows: int, rng: torch.Generator) -> list[int]:
    weights = torch.tensor([1 / (slot + 1) ** 1.5 for slot in range(len(RANKS))])
    return torch.multinomial(weights, num_rows, True, generator=rng).tolist()


def uniform(num_rows: int, rng: torch.Generator) -> list[int]:
    return torch.randint(0, len(RANKS), (num_rows,), generator=rng).tolist()


Popularity = Callable[[int, torch.Generator], list[int]]
POPULARITY: dict[str, Popularity] = {
    "distinct": lambda num_rows, _: list(range(min(num_rows, len(RANKS)))),
    "uniform": lambda num_rows, rng: sorted(uniform(num_rows, rng)),
    "zipf": lambda num_rows, rng: sorted(zipf(num_rows, rng)),
    "identical": lambda num_rows, _: [3] * num_rows,
    "skewed": lambda num_rows, _: [0, *[1] * (num_rows - 2), 4] if num_rows > 2 else [1],
    "none": lambda num_rows, _: [NO_ADAPTER] * num_rows,
    "some_without": lambda num_rows, rng: [s - 1 for s in sorted(uniform(num_rows, rng))],
    "unordered": uniform,
}


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_rows", [1, 7, 33])
def test_lora(ops: Ops, bank: Bank, rng: torch.Generator, popularity: str, num_rows: int) -> None:
    check_lora(ops, bank, rng, POPULARITY[popularity](num_rows, rng))


def test_lora_of_segments_short_and_long(ops: Ops, bank: Bank, rng: torch.Generator) -> None:
    """Two decode rows, then prefills at both sides of the length that is computed otherwise."""
    long, short = LONG_SEGMENT, LONG_SEGMENT - 1
    check_lora(ops, bank, rng, [1, 4, *[3] * long, *[1] * short, -1, *[2] * (long + 5)])


def check_lora(ops: Ops, bank: Bank, rng: torch.Generator, slots: list[int]) -> None:
    x = torch.randn(len(slots), K, generator=rng).to(bank.dtype)
    y = torch.randn(len(slots), N, generator=rng).to(bank.dtype)
    before = y.clone()
    lora = bank.lora_input(slots)
    ops.lora_(y, x, lora, 1, PROJECTIONS)
    assert_close(y, bank.reference(before, x, slots, 1), bank.dtype)
    for row, slot in enumerate(slots):
        for module, column, width in PROJECTIONS:
            if slot == NO_ADAPTER or RANKS[slot][module] == 0:
                columns = slice(column, column + width)
                assert torch.equal(y[row, columns], before[row, columns])


@pytest.mark.parametrize("num_rows", [24, LONG_SEGMENT])
def test_lora_in_bf16_rounds_as_little_as_plain_products(
    ops: Ops, rng: torch.Generator, num_rows: int
) -> None:
    bank = bank_of(torch.bfloat16, rng)
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


# Attention, over one layer's view into a cache that is NaN outside the sequences' own tokens.


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


HEADS = [
    pytest.param(Heads(3, 3, 64), id="mha64"),
    pytest.param(Heads(9, 3, 64), id="gqa3x64"),
    pytest.param(Heads(8, 2, 80), id="gqa4x80"),
    pytest.param(Heads(4, 1, 128), id="mqa4x128"),
]
BLOCK_TOKENS = 16
DECODES = [1, 2, 15, 16, 17, 33, 100]  # contexts
PREFILLS = [(2, 2), (16, 16), (40, 40), (33, 17), (48, 16), (50, 3)]  # (context, queries)


@dataclass(frozen=True)
class Paged:
    """Sequences in a poisoned cache: `k`, `v` fp32 [context, kv_heads, dim] of each."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    where: AttentionInput
    k: list[Tensor]
    v: list[Tensor]


def paged(heads: Heads, dtype: torch.dtype, rng: torch.Generator) -> Paged:
    contexts = DECODES + [context for context, _ in PREFILLS]
    queries = [1] * len(DECODES) + [count for _, count in PREFILLS]
    num_blocks = [-(-context // BLOCK_TOKENS) for context in contexts]
    cache = poison((sum(num_blocks) + 9) * 2 * 2 * heads.kv * BLOCK_TOKENS * heads.dim * 4)
    cache = cache.view(dtype)[: cache.numel() // 4]
    cache = cache.view(-1, 2, 2, heads.kv, BLOCK_TOKENS, heads.dim)  # as the arena: two layers
    k_cache, v_cache = cache[:, 1, 0], cache[:, 1, 1]
    shuffled = torch.randperm(cache.shape[0], generator=rng).tolist()
    tables = torch.zeros(len(contexts), max(num_blocks) + 1, dtype=torch.int32)
    k, v = [], []
    for index, context in enumerate(contexts):
        blocks = [shuffled.pop() for _ in range(num_blocks[index])]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        k.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        v.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        for token in range(context):
            block = blocks[token // BLOCK_TOKENS]
            k_cache[block, :, token % BLOCK_TOKENS] = k[-1][token]
            v_cache[block, :, token % BLOCK_TOKENS] = v[-1][token]
    starts = [sum(queries[:index]) for index in range(len(queries) + 1)]
    qkv = torch.full((starts[-1], heads.query + 2 * heads.kv, heads.dim), torch.nan, dtype=dtype)
    qkv[:, : heads.query] = torch.randn(starts[-1], heads.query, heads.dim, generator=rng) * 2
    where = AttentionInput(
        num_decode=len(DECODES),
        query_starts=starts,
        context_lens=contexts,
        context_table=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
    )
    return Paged(qkv.flatten(1), k_cache, v_cache, where, k, v)


def attention_reference(data: Paged, heads: Heads) -> Tensor:
    q = data.qkv.view(data.qkv.shape[0], -1, heads.dim).float()
    out = torch.empty(q.shape[0], heads.query, heads.dim)
    for index, (k, v) in enumerate(zip(data.k, data.v, strict=True)):
        lo, hi = data.where.query_starts[index], data.where.query_starts[index + 1]
        for row in range(lo, hi):
            seen = data.where.context_lens[index] - (hi - 1 - row)
            for head in range(heads.query):
                group = head * heads.kv // heads.query
                scores = k[:seen, group].float() @ q[row, head] / math.sqrt(heads.dim)
                out[row, head] = torch.softmax(scores, 0) @ v[:seen, group].float()
    return out.flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention(ops: Ops, dtype: torch.dtype, heads: Heads, rng: torch.Generator) -> None:
    data = paged(heads, dtype, rng)
    out = ops.attention(data.qkv, data.k_cache, data.v_cache, data.where)
    assert_close(out, attention_reference(data, heads), dtype)


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
    out = ops.attention(data.qkv, data.k_cache, data.v_cache, data.where)
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
        block, offset = divmod(place, BLOCK_TOKENS)
        cached = cache[block, 1, :, :, offset].clone()  # [k or v, kv_heads, dim]
        assert torch.equal(cached.flatten(0, 1), after[token, heads.query :])
        cache[block, 1, :, :, offset] = torch.nan
    assert cache.isnan().all()


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
    out = ops.add_rms_norm(changed, delta, weight, 1e-5, dtype)
    assert torch.equal(changed, summed)
    for row in range(shape[0]):
        if expected[row].any():
            assert_close(out[row], expected[row], dtype)
        else:
            assert not out[row].any()


GATES = (-3e38, -1e30, -1e4, -104, -89, -88, -20, -1, -1e-30, 0, 1e-30, 0.5, 20, 88, 104, 1e30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(ops: Ops, dtype: torch.dtype, rng: torch.Generator) -> None:
    gate = torch.cat((torch.tensor(GATES), torch.randn(85, generator=rng) * 5)).to(dtype)
    up = torch.randn(3, gate.numel(), generator=rng).to(dtype)
    out = ops.silu_mul(torch.cat((gate.expand_as(up), up), 1))
    assert out.dtype == dtype
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    error = (out.double() - expected).abs()
    assert (error <= TOLERANCE[dtype] * expected.abs() + 1e-30).all()


def test_silu_mul_keeps_nan(ops: Ops) -> None:
    gate_up = torch.ones(2, 2 * 99)
    gate_up[0, 7] = gate_up[1, 99 + 98] = torch.nan
    nan = torch.zeros(2, 99, dtype=torch.bool)
    nan[0, 7] = nan[1, 98] = True
    assert torch.equal(ops.silu_mul(gate_up).isnan(), nan)


# A row's result depends on that row alone, bit for bit; so a request answers the same in any batch.


@pytest.fixture
def native(native_library: ctypes.CDLL) -> NativeOps:
    ops = NativeOps(native_library)
    native_library.loraplex_set_num_threads(2)
    return ops


def alone(data: Paged, index: int) -> tuple[Tensor, AttentionInput]:
    where = AttentionInput(
        num_decode=1,
        query_starts=[0, 1],
        context_lens=[data.where.context_lens[index]],
        context_table=data.where.context_table[index : index + 1],
        block_tables=data.where.block_tables[index : index + 1],
    )
    return data.qkv[index : index + 1], where


def rows(tensor: Tensor) -> Iterator[Tensor]:
    return (tensor[row : row + 1] for row in range(tensor.shape[0]))


if HAS_COMPILER:

    def test_native_lora_row_by_row(native: NativeOps, bank: Bank, rng: torch.Generator) -> None:
        slots = POPULARITY["zipf"](41, rng)
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
        data = paged(Heads(9, 3, 64), dtype, rng)
        together = native.attention(data.qkv, data.k_cache, data.v_cache, data.where)
        for index in range(len(DECODES)):
            qkv, where = alone(data, index)
            single = native.attention(qkv, data.k_cache, data.v_cache, where)
            assert torch.equal(single[0], together[index])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_native_side_work_row_by_row(
        native: NativeOps, dtype: torch.dtype, rng: torch.Generator
    ) -> None:
        residual = torch.randn(9, 100, generator=rng)
        delta = torch.randn(9, 100, generator=rng).to(dtype)
        weight = torch.randn(100, generator=rng)
        single = [
            native.add_rms_norm(r.clone(), d, weight, 1e-5, dtype)
            for r, d in zip(rows(residual), rows(delta), strict=True)
        ]
        assert torch.equal(
            torch.cat(single), native.add_rms_norm(residual, delta, weight, 1e-5, dtype)
        )
        gated = [native.silu_mul(row) for row in rows(delta)]
        assert torch.equal(torch.cat(gated), native.silu_mul(delta))
