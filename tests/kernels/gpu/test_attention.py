"""Paged attention against the plain form: one batch of every kind of sequence a launch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex_kernels.gpu.attention import attention
from loraplex_kernels.gpu.launch import Launch, configs, launch_now
from loraplex_kernels.gpu.rotary import rotary_and_cache
from loraplex_kernels.ops import AttentionInput
from torch import Tensor

from tests.kernels.gpu.banks import PoisonedWorkspace, Recorder
from tests.kernels.gpu.caches import attention_input, attention_reference, paged, poisoned
from tests.kernels.inputs import Heads, Paged

DECODES = [1, 15, 0, 16, 17, 33, 130, 1, 0, 600]  # contexts; 0: padding
PREFILLS = [(2, 2), (16, 16), (17, 17), (40, 40), (33, 17), (70, 20), (130, 5), (100, 33)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ONE_SPLIT, SPLITS = "interpreter", "sm_90"
CASES = [  # heads, tokens in a block, window, target
    pytest.param(Heads(3, 3, 64), 16, None, ONE_SPLIT, id="mha64"),
    pytest.param(Heads(3, 1, 64), 48, 17, SPLITS, id="gqa3x64"),
    pytest.param(Heads(8, 2, 80), 16, 1, SPLITS, id="gqa4x80"),
    pytest.param(Heads(7, 1, 128), 48, None, SPLITS, id="gqa7x128"),
    pytest.param(Heads(8, 1, 96), 16, 500, ONE_SPLIT, id="gqa8x96"),
    pytest.param(Heads(2, 1, 256), 16, 40, "sm_80", id="gqa2x256"),
    pytest.param(Heads(72, 1, 64), 32, None, ONE_SPLIT, id="mqa72x64"),  # blocks of rows
    pytest.param(Heads(2, 1, 16), 16, None, SPLITS, id="gqa2x16"),
]


def attend(
    data: Paged,
    window: int | None,
    target: str,
    where: AttentionInput | None = None,
    launch: Launch = launch_now,
) -> Tensor:
    """The result, which was NaN between rows of NaN; nothing else may change."""
    where = data.where if where is None else where
    before = [tensor.clone() for tensor in (data.qkv, data.k_cache, data.v_cache)]
    kv_heads, _, dim = data.k_cache.shape[1:]
    num_rows = where.query_starts[-1]
    whole = poisoned((num_rows + 2, data.qkv.shape[1] - 2 * kv_heads * dim), data.qkv.dtype)
    out = whole[1:-1]
    attention(
        launch,
        data.qkv[:num_rows],
        data.k_cache,
        data.v_cache,
        where,
        out,
        window,
        PoisonedWorkspace(),
        target,
    )
    assert whole[[0, -1]].isnan().all()
    for tensor, expected in zip((data.qkv, data.k_cache, data.v_cache), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
    return out


def assert_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.float() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[actual.dtype], f"error {error:.2e}"


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")],
)
@pytest.mark.parametrize(("heads", "block_tokens", "window", "target"), CASES)
def test_attention(
    heads: Heads,
    block_tokens: int,
    window: int | None,
    target: str,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    data = paged(DECODES, PREFILLS, heads, block_tokens, dtype, rng)
    out = attend(data, window, target)
    assert_close(out, attention_reference(data, heads, window))
    for row, context in enumerate(DECODES):
        assert out[row].any() == (context > 0)


@pytest.mark.parametrize("target", [ONE_SPLIT, SPLITS])
def test_attention_in_bf16(target: str, rng: torch.Generator) -> None:
    heads = Heads(4, 1, 80)
    data = paged([1, 0, 130], [(40, 20)], heads, 16, torch.bfloat16, rng)
    assert_close(attend(data, None, target), attention_reference(data, heads, None))


@pytest.mark.parametrize("window", [None, 40])
def test_a_nan_stays_in_the_rows_that_see_it(window: int | None, rng: torch.Generator) -> None:
    """Token 3 of some sequences; its value too where all rows or none of a tile see the token."""
    data = paged(DECODES, PREFILLS, Heads(3, 1, 64), 16, torch.float32, rng)
    num_decode, starts = data.where.num_decode, data.where.query_starts
    sick = torch.zeros(data.qkv.shape[0], dtype=torch.bool)
    for index in (5, 9, num_decode + 3, num_decode + 7):
        block = int(data.where.block_tables[index, 0])
        data.k_cache[block, :, 3, 0] = torch.nan
        if index != num_decode + 3:
            data.v_cache[block, :, 3, 0] = torch.nan
        lo, hi = starts[index : index + 2]
        position = data.where.context_lens[index] - hi + torch.arange(lo, hi)
        sick[lo:hi] = (position >= 3) & (position < 3 + (window or 1000))
    for target in (ONE_SPLIT, SPLITS):
        assert torch.equal(attend(data, window, target).isnan().any(1), sick)


def alone(data: Paged, index: int) -> tuple[Paged, AttentionInput]:
    """One sequence of the batch as a batch."""
    where = data.where
    lo, hi = where.query_starts[index : index + 2]
    tables = where.block_tables[index : index + 1, : max(-(-where.context_lens[index] // 16), 1)]
    single = attention_input(
        int(index < where.num_decode), [0, hi - lo], [where.context_lens[index]], tables.clone()
    )
    return replace(data, qkv=data.qkv[lo:hi]), single


@pytest.mark.parametrize("target", [ONE_SPLIT, SPLITS])
def test_a_row_does_not_depend_on_its_neighbours(target: str, rng: torch.Generator) -> None:
    data = paged(DECODES, PREFILLS, Heads(3, 1, 64), 16, torch.float16, rng)
    together = attend(data, 70, target)
    starts = data.where.query_starts
    for index in (0, 2, 6, 9, 10, 15, 17):
        single, where = alone(data, index)
        assert torch.equal(
            attend(single, 70, target, where), together[starts[index] : starts[index + 1]]
        )


@pytest.mark.parametrize("target", [ONE_SPLIT, SPLITS])
def test_one_launch_serves_whatever_the_tensors_say(target: str, rng: torch.Generator) -> None:
    """Recorded for a batch of padding, and replayed as a captured graph is."""
    heads, num_rows = Heads(4, 2, 64), 6
    contexts = ([1, 2, 3, 4, 5, 6], [600, 0, 33, 1, 0, 17], [0] * 6, [65, 64, 63, 128, 0, 0])
    data = [paged(decodes, [], heads, 16, torch.float32, rng) for decodes in contexts]
    blocks = max(batch.k_cache.shape[0] for batch in data)
    k_cache = poisoned((blocks, *data[0].k_cache.shape[1:]), torch.float32)
    v_cache = k_cache.clone()
    tables = torch.zeros(num_rows, 40, dtype=torch.int32)
    where = attention_input(num_rows, list(range(num_rows + 1)), [0] * num_rows, tables)
    fixed = Paged(torch.zeros_like(data[0].qkv), k_cache, v_cache, where, [], [])
    recorder = Recorder()
    out = attend(fixed, None, target, launch=recorder)
    for batch in data:
        fixed.qkv.copy_(batch.qkv)
        k_cache[: batch.k_cache.shape[0]] = batch.k_cache
        v_cache[: batch.v_cache.shape[0]] = batch.v_cache
        where.context_table.copy_(batch.where.context_table)
        tables[:, : batch.where.block_tables.shape[1]] = batch.where.block_tables
        fresh = Recorder()
        attend(fixed, None, target, launch=fresh)
        assert fresh.arguments == recorder.arguments
        out.fill_(torch.nan)
        recorder.replay()
        expected = attention_reference(batch, heads, None)
        assert (out - expected).abs().max() <= 1e-5 * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("target", [ONE_SPLIT, SPLITS])
def test_what_is_launched(target: str, rng: torch.Generator) -> None:
    """Decode is one launch, or two with splits; prefill one; neither where it has no rows."""
    num_decode_launches = 1 if configs("attention", target)["decode_64"]["SPLITS"] == 1 else 2
    for decodes, prefills, expected in (
        ([3, 0], [], num_decode_launches),
        ([], [(5, 5)], 1),
        ([3], [(5, 5)], num_decode_launches + 1),
    ):
        recorder = Recorder()
        data = paged(decodes, prefills, Heads(2, 1, 64), 16, torch.float32, rng)
        attend(data, None, target, launch=recorder)
        assert len(recorder.arguments) == expected


def test_a_cache_of_more_elements_than_int32_counts(tmp_path: Path) -> None:
    """In a file with a hole; one token is written to its last block, and read back."""
    stride = 2**30 + 64
    file = torch.from_file(
        str(tmp_path / "cache"), shared=True, size=3 * stride, dtype=torch.float16
    )
    cache = file.as_strided((3, 2, 1, 16, 64), (stride, 16 * 64, 16 * 64, 64, 1))
    k_cache, v_cache = cache[:, 0], cache[:, 1]
    qkv = torch.arange(3 * 64, dtype=torch.float16).view(1, -1)
    angles, slot = torch.zeros(1, 32), torch.tensor([2 * 16])
    rotary_and_cache(launch_now, qkv, angles.cos(), angles.sin(), k_cache, v_cache, slot)
    where = attention_input(1, [0, 1], [1], torch.tensor([[2]], dtype=torch.int32))
    out = poisoned((1, 64), torch.float16)
    attention(launch_now, qkv, k_cache, v_cache, where, out, None, PoisonedWorkspace(), ONE_SPLIT)
    assert torch.equal(out, qkv[:, 128:])
