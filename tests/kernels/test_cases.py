"""The cases themselves: torch's ops pass them all, and their floors are the bytes they must be."""

from dataclasses import replace

import pytest
import torch
from loraplex_kernels.cases import SERVING, TINY, Case, CaseMaker, ModelShapes, Scale, cases
from loraplex_kernels.cases.table import mixed_ranks, mixed_slots, prefill_slots
from loraplex_kernels.check import LIMITS, check, relative_error
from loraplex_kernels.gpu.ops import KERNELS
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import LONG_TILE_ROWS, NO_ADAPTER, segments_of
from torch import Tensor

SHAPES = ModelShapes(
    name="tiny",
    hidden_size=128,
    intermediate_size=192,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    num_layers=2,
)
QKV, OUT, GATE_UP, DOWN = SHAPES.linears


def maker(dtype: torch.dtype) -> CaseMaker:
    return CaseMaker(SHAPES, torch.device("cpu"), dtype, max_rank=64)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("scale", [TINY, SERVING], ids=["tiny", "serving"])
def test_torch_passes_every_case(scale: Scale, dtype: torch.dtype) -> None:
    seen = set()
    for case in cases(SHAPES, torch.device("cpu"), dtype, scale=scale):
        prepared = case.prepare()
        prepared.poison()
        expected = prepared.expected()
        result = prepared.run(TorchOps())
        # Torch's form of the linear rounds the weight to bf16 in fp16 too, the fused one does not.
        is_rounded = case.kernel == "nf4_linear" and dtype is torch.float16
        limit = LIMITS[torch.bfloat16 if is_rounded else dtype]
        assert relative_error(result, expected) < limit, case
        assert prepared.is_intact(), case
        seen.add(case.kernel)
    assert seen == {*KERNELS}


def test_caches_and_tables_are_the_models_own() -> None:
    """Recorded, as a kernel would see them; and torch passes with them."""
    seen: set[tuple[str, *tuple[int, ...]]] = set()

    class Recording(TorchOps):
        def rotary_and_cache(
            self,
            qkv: Tensor,
            cos: Tensor,
            sin: Tensor,
            k_cache: Tensor,
            v_cache: Tensor,
            slot_mapping: Tensor,
        ) -> None:
            seen.add(("rotary", k_cache.shape[2]))
            super().rotary_and_cache(qkv, cos, sin, k_cache, v_cache, slot_mapping)

        def attention(
            self,
            qkv: Tensor,
            k_cache: Tensor,
            v_cache: Tensor,
            where: AttentionInput,
            out: Tensor,
            window: int | None = None,
        ) -> None:
            seen.add(("attention", k_cache.shape[2]))
            super().attention(qkv, k_cache, v_cache, where, out, window)

        def lora_(
            self,
            y: Tensor,
            x: Tensor,
            lora: LoraInput,
            layer: int,
            projections: tuple[Projection, ...],
        ) -> None:
            seen.add(("layers", lora.tables.num_granules.shape[1], layer))
            super().lora_(y, x, lora, layer, projections)

    shapes = replace(SHAPES, num_layers=5, block_tokens=48)
    make_all = cases(shapes, torch.device("cpu"), torch.float32, scale=TINY)
    assert {outcome.failure for outcome in check(make_all, Recording(), torch.float32)} == {None}
    assert seen == {("rotary", 48), ("attention", 48), ("layers", 5, 4)}


def test_what_is_not_written_stays_nan() -> None:
    """Or, of what is changed in place, as it was: nothing is right by chance."""
    for case in cases(SHAPES, torch.device("cpu"), torch.float32, scale=TINY):
        prepared = case.prepare()
        prepared.poison()
        result = prepared.result()
        in_place = case.kernel in ("lora", "scale_output")
        assert bool(result.isnan().any()) != in_place
        assert not torch.equal(result, prepared.expected())


def test_a_run_can_be_repeated() -> None:
    for case in cases(SHAPES, torch.device("cpu"), torch.float32, scale=TINY):
        prepared = case.prepare()
        results = []
        for _ in range(2):
            prepared.poison()
            results.append(prepared.run(TorchOps()))
        assert torch.equal(*results)


def test_without_filling_any_shape_is_free() -> None:
    shapes = ModelShapes("large", 4096, 14336, 32, 8, 128, 32)
    meta = torch.device("meta")
    for case in cases(shapes, meta, torch.bfloat16, fill=False):
        case.prepare()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # The residual is read and written, fp32.
        (maker(torch.bfloat16).add_rms_norm(3), 3 * 128 * (4 + 4 + 2 + 2) + 4 * 128),
        (maker(torch.bfloat16).add_rms_norm(1, has_delta=False), 128 * (4 + 2) + 4 * 128),
        # 8 heads are turned in place, 2 are read, 4 are written; cos and sin; the mapping.
        (maker(torch.float32).rotary_and_cache(5), 5 * ((16 + 2 + 4) * 32 * 4 + 32 * 4 + 8)),
        (maker(torch.bfloat16).silu_mul(7), 7 * 3 * 192 * 2),
        # 6 heads of q and of the output a row; 2 of k and v a key.
        (
            maker(torch.bfloat16).attention("", [(9, 1), (30, 4)]),
            (5 * 2 * 6 + (9 + 30) * 2 * 2) * 32 * 2,
        ),
        (
            maker(torch.bfloat16).attention("", [(9, 1), (30, 4)], window=7),
            (5 * 2 * 6 + (7 + 10) * 2 * 2) * 32 * 2,
        ),
        # One adapter of rank 3 on q alone, two of three rows.
        (
            maker(torch.float32).lora(QKV, [[3, 0, 0]], [NO_ADAPTER, 0, 0]),
            4 * (3 * (128 + 192) + 2 * (128 + 2 * 192)),
        ),
        # Slot 0 on k, slot 1 on q and v, each factor once; fp32 factors of bf16 values.
        (
            maker(torch.bfloat16).scale_output(
                QKV, [[False, True, False], [True, False, True]], [NO_ADAPTER, 0, 1, 1]
            ),
            2 * 2 * (64 + 2 * (192 + 64)) + 4 * (64 + 192 + 64),
        ),
        # 256 x 128 codes, an absmax for 64 of them, and rank 5 on v once.
        (
            maker(torch.bfloat16).nf4_linear(QKV, [[0, 0, 5]], [0, 0]),
            320 * 128 // 2 + 320 * 128 // 64 * 4 + 2 * (128 + 320) * 2 + 5 * (128 + 64) * 2,
        ),
    ],
    ids=lambda value: value.kernel if isinstance(value, Case) else "",
)
def test_bytes_moved(case: Case, expected: int) -> None:
    assert case.bytes_moved == expected


def test_the_linears_of_a_layer() -> None:
    assert QKV.projections == (
        Projection(0, 0, 192),
        Projection(1, 192, 64),
        Projection(2, 256, 64),
    )
    assert (OUT.in_features, OUT.projections) == (192, (Projection(3, 0, 128),))
    assert GATE_UP.projections == (Projection(4, 0, 192), Projection(5, 192, 192))
    assert (DOWN.in_features, DOWN.out_features) == (192, 128)


def test_slots_of_the_cases_are_mixed() -> None:
    assert mixed_slots(1) == [7]
    assert sorted({*mixed_slots(32)}) == [NO_ADAPTER, *range(8)]
    for scale in (TINY, SERVING):
        lengths = [hi - lo for _, lo, hi in segments_of(prefill_slots(scale.prefill_rows))]
        assert min(lengths) < LONG_TILE_ROWS < max(lengths)
    ranks = mixed_ranks(QKV, 64)
    assert {rank for own in ranks for rank in own} == {0, 1, 8, 16, 33, 64}
    assert max(rank for own in mixed_ranks(DOWN, 8) for rank in own) == 8
