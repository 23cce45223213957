"""Packed adapters hold the uploaded matrices, tightly, and wherever the blocks happen to lie."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapters.dora import output_scale
from loraplex.adapters.packing import (
    ALIGNMENT,
    BaseWeights,
    Layout,
    PackedAdapter,
    Placed,
    blended,
    open_packed,
    pack,
    place,
    save_packed,
)
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config
from loraplex.engine.model_runner import block_shape
from loraplex.errors import AdapterInvalidError
from loraplex.model.config import MODULES, ModelConfig, Rope
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.tables import AdapterTables, Granule, view
from loraplex_kernels.vocabulary import CutMatrix
from safetensors.torch import save_file
from torch import Tensor

FILE = "adapter_model.safetensors"
LAYOUT = Layout(block_bytes=16384, dtype=torch.bfloat16)
SHAPES = {"q_proj": (64, 96), "k_proj": (32, 96), "down_proj": (96, 200)}
VOCAB, HIDDEN = 700, 96
RANKS = {"q_proj": 5, "k_proj": 40, "down_proj": 16, "lm_head": 19, "embed_tokens": 24}
ALPHA = 24
EMBED, HEAD = "model.embed_tokens", "lm_head"
ALONG_VOCABULARY = {
    EMBED: BaseLinear(EMBED, None, "embed_tokens", HIDDEN, VOCAB),
    HEAD: BaseLinear(HEAD, None, "lm_head", VOCAB, HIDDEN),
}
LINEARS = {
    linear.name: linear
    for layer in range(2)
    for module, (out_features, in_features) in SHAPES.items()
    for linear in [
        BaseLinear(f"model.layers.{layer}.{module}", layer, module, out_features, in_features)
    ]
}


def upload(
    folder: Path,
    dtype: torch.dtype,
    scale: float = 1.0,
    modules: Mapping[str, BaseLinear] = LINEARS,
    along: Mapping[str, Tensor] | None = None,
    **fields: object,
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """A real upload, validated: ranks by module, one module of layer 1 left out."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tensors = dict(along or {})
    for name, module in modules.items():
        if name == "model.layers.1.q_proj":
            continue
        rank, prefix = RANKS[module.module], f"base_model.model.{name}.lora_"
        a, b = ("embedding_A", "embedding_B") if name == EMBED else ("A.weight", "B.weight")
        tensors[prefix + a] = drawn(rank, module.in_features)
        tensors[prefix + b] = drawn(module.out_features, rank)
        if "use_dora" in fields:
            tensors[f"{prefix}magnitude_vector"] = drawn(module.out_features)
    save_file(tensors, folder / FILE)
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": ALPHA, "rank_pattern": RANKS, **fields}
    spec = read_adapter(
        folder / FILE, read_config(json.dumps(config), 64), LINEARS | ALONG_VOCABULARY, 64
    )
    return spec, tensors


def base_weights(name: str) -> Tensor:
    """A base that is the same at every call."""
    module = (LINEARS | ALONG_VOCABULARY)[name]
    shape = (module.out_features, module.in_features)
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape[::-1] if name == EMBED else shape, generator=generator).bfloat16()


def no_base(name: str) -> Tensor:
    raise AssertionError(f"{name} of the base is asked for")


def in_arena(packed: PackedAdapter) -> tuple[Tensor, Placed]:
    """An arena of noise with the adapter's blocks in it, out of order and apart."""
    size = packed.data.shape[1]
    blocks = [7, 1, 4, 9, 2, 0, 12, 5, 15, 3, 6, 8, 10][: packed.num_blocks]
    arena = torch.full(((max(blocks) + 1) * size,), 0xFF, dtype=torch.uint8)
    for source, block in zip(packed.data, blocks, strict=True):
        arena[block * size : (block + 1) * size] = source
    return arena, packed.placed(blocks)


def packed_twice(
    folder: Path, spec: AdapterSpec, base: BaseWeights = no_base, layout: Layout = LAYOUT
) -> PackedAdapter:
    """As it comes back from its file."""
    packed = pack(folder / FILE, spec, layout, base)
    save_packed(packed, folder / "packed.safetensors")
    again = open_packed(folder / "packed.safetensors")
    assert again.contents == packed.contents
    assert torch.equal(again.data, packed.data)
    assert again.num_bytes == again.num_blocks * layout.block_bytes
    return again


def matrices(
    packed: PackedAdapter, layout: Layout
) -> dict[tuple[int, str], tuple[Tensor, Tensor, float]]:
    """A and B^T with all their ranks and the scale, found through tables."""
    arena, placed = in_arena(packed)
    tables = AdapterTables(1, 2, len(MODULES), 64, torch.device("cpu"))
    tables.write(0, placed.granules)
    found = {}
    for linear in LINEARS.values():
        assert linear.layer is not None
        granules = tables.granules(0, linear.layer, MODULES.index(linear.module))
        if granules:
            a = [
                layout.form.read_a(arena, at, linear.in_features, layout.dtype)
                for at, _, _ in granules
            ]
            b = [
                layout.form.read_b(arena, at, linear.out_features, layout.dtype)
                for _, at, _ in granules
            ]
            (scale,) = {scale for _, _, scale in granules}
            found[linear.layer, linear.module] = (torch.cat(a), torch.cat(b), scale)
    return found


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        *((dtype, GranuleForm.ROWS) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        (torch.float32, GranuleForm.OPERANDS),
    ],
)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, form: GranuleForm) -> None:
    spec, tensors = upload(tmp_path, dtype)
    layout = replace(LAYOUT, form=form)
    packed = packed_twice(tmp_path, spec, layout=layout)
    assert packed.num_parts == 3
    found = matrices(packed, layout)
    assert found.keys() == {(x.layer, x.module) for x in LINEARS.values()} - {(1, "q_proj")}
    for (layer, module), (a, b_transposed, scale) in found.items():
        rank, name = RANKS[module], f"base_model.model.model.layers.{layer}.{module}"
        assert a.shape[0] == -(-rank // GRANULE_RANK) * GRANULE_RANK
        assert torch.equal(a[:rank], tensors[f"{name}.lora_A.weight"].to(LAYOUT.dtype))
        assert torch.equal(b_transposed[:rank].T, tensors[f"{name}.lora_B.weight"].to(LAYOUT.dtype))
        assert not a[rank:].any()
        assert not b_transposed[rank:].any()
        assert scale == pytest.approx(ALPHA / rank)


def test_dora_brings_a_scale_for_every_output(tmp_path: Path) -> None:
    spec, tensors = upload(tmp_path, torch.float32, use_dora=True)
    packed = packed_twice(tmp_path, spec, base_weights)
    arena, placed = in_arena(packed)
    assert len(placed.output_scales) == len(spec.modules) == len(LINEARS) - 1
    for layer, index, offset in placed.output_scales:
        name = f"model.layers.{layer}.{MODULES[index]}"
        prefix, rank = f"base_model.model.{name}.lora_", RANKS[MODULES[index]]
        a, b = tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"]
        expected = output_scale(
            base_weights(name), a, b, ALPHA / rank, tensors[f"{prefix}magnitude_vector"]
        )
        assert offset % ALIGNMENT == 0
        assert torch.equal(view(arena, offset, 1, len(expected), torch.float32)[0], expected)


def test_a_magnitude_for_an_output_that_is_always_zero_is_refused(tmp_path: Path) -> None:
    spec, _ = upload(tmp_path, torch.float32, scale=0.0, use_dora=True)
    with pytest.raises(AdapterInvalidError, match="not finite") as caught:
        pack(tmp_path / FILE, spec, LAYOUT, lambda name: torch.zeros_like(base_weights(name)))
    assert (caught.value.field or "").endswith("q_proj.lora_magnitude_vector")


def whole(arena: Tensor, matrix: CutMatrix) -> Tensor:
    firsts = range(0, matrix.rows, matrix.piece_rows)
    return torch.cat(
        [
            view(arena, at, min(matrix.piece_rows, matrix.rows - i), matrix.columns, LAYOUT.dtype)
            for i, at in zip(firsts, matrix.offsets, strict=True)
        ]
    )


def test_what_lies_along_the_vocabulary_is_cut_by_rows(tmp_path: Path) -> None:
    spec, tensors = upload(tmp_path, torch.float32, modules=ALONG_VOCABULARY)
    packed = packed_twice(tmp_path, spec)
    assert packed.num_parts == 2
    arena, placed = in_arena(packed)
    assert not placed.granules
    [embedding], [head] = placed.vocabulary.embedding, placed.vocabulary.head
    prefix = "base_model.model."
    for update, wide, narrow in (
        (
            embedding,
            tensors[f"{prefix}{EMBED}.lora_embedding_A"].T,
            tensors[f"{prefix}{EMBED}.lora_embedding_B"].T,
        ),
        (head, tensors[f"{prefix}{HEAD}.lora_B.weight"], tensors[f"{prefix}{HEAD}.lora_A.weight"]),
    ):
        assert len(update.wide.offsets) > 1
        assert torch.equal(whole(arena, update.wide), wide.bfloat16())
        assert torch.equal(whole(arena, update.narrow), narrow.bfloat16())
    assert (embedding.scale, head.scale) == (ALPHA / 24, ALPHA / 19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_weight_of_the_base_may_come_along_if_it_is_the_bases_own(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tensor = f"base_model.model.{name}.base_layer.weight"
    own = base_weights(name).to(dtype)
    spec, _ = upload(tmp_path, torch.float32, along={tensor: own})
    pack(tmp_path / FILE, spec, LAYOUT, base_weights)
    own[-1, -1] *= 1.01
    spec, _ = upload(tmp_path, torch.float32, along={tensor: own})
    with pytest.raises(AdapterInvalidError, match="not this base model's own") as caught:
        pack(tmp_path / FILE, spec, LAYOUT, base_weights)
    assert caught.value.field == tensor


def test_a_blend_lists_its_members_side_by_side(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    members = []
    for folder, modules in zip(folders, (LINEARS, LINEARS | ALONG_VOCABULARY), strict=True):
        folder.mkdir()
        spec, _ = upload(folder, torch.float32, modules=modules)
        members.append(pack(folder / FILE, spec, LAYOUT, no_base).contents)
    first, second = members
    blend = blended([(first, 0.5), (second, -2.0)])
    assert not blend.output_scales
    for layer, module in {(g.layer, g.module) for g in first.granules}:

        def of(placed: Placed, where: tuple[int, int] = (layer, module)) -> list[Granule]:
            return [g for g in placed.granules if (g.layer, g.module) == where]

        assert [g.part for g in of(blend)] == list(range(len(of(blend))))
        assert [(g.a, g.b, g.scale) for g in of(blend)] == [
            *((g.a, g.b, 0.5 * g.scale) for g in of(first)),
            *((g.a, g.b, -2.0 * g.scale) for g in of(second)),
        ]
    for ours, theirs in zip(blend.vocabulary, second.vocabulary, strict=True):
        assert ours == tuple(u._replace(scale=-2.0 * u.scale) for u in theirs)
    assert blended([]) == Placed(())


def test_values_that_the_servers_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    spec, _ = upload(tmp_path, torch.float32, scale=1e30)
    with pytest.raises(AdapterInvalidError, match="float16 cannot hold"):
        pack(tmp_path / FILE, spec, Layout(16384, torch.float16), no_base)


def test_the_fingerprint_is_the_layouts() -> None:
    layouts = [
        Layout(size, dtype, form)
        for size in (4096, 8192)
        for dtype in (torch.bfloat16, torch.float32)
        for form in GranuleForm
    ]
    assert len({layout.fingerprint for layout in layouts}) == 8
    assert Layout(4096, torch.bfloat16).fingerprint == layouts[0].fingerprint


@settings(deadline=None)
@given(
    st.integers(1, 64).flatmap(
        lambda lines: st.tuples(
            st.just(lines * ALIGNMENT),
            st.lists(st.integers(1, lines * ALIGNMENT), min_size=1, max_size=60),
        )
    )
)
def test_place(case: tuple[int, list[int]]) -> None:
    block_bytes, sizes = case
    offsets, num_blocks = place(sizes, block_bytes)
    spans = sorted((offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert all(start // block_bytes == (end - 1) // block_bytes for start, end in spans)
    assert {start // block_bytes for start, _ in spans} == set(range(num_blocks))
    # Tight: no piece would have fitted into what is left of a block before its own.
    used = [0] * num_blocks
    for start, end in spans:
        used[start // block_bytes] += -(-(end - start) // ALIGNMENT) * ALIGNMENT
    for start, end in spans:
        assert all(left + end - start > block_bytes for left in used[: start // block_bytes])


SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM",
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    context_length=8192,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    rope=Rope(100000.0),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sixteen_adapters_take_little_more_than_their_own_ranks(dtype: torch.dtype) -> None:
    ranks = [4, 4, 8, 8, 12, 16, 16, 16, 20, 24, 32, 32, 40, 48, 64, 64]
    block = block_shape(SMOLLM2, dtype, dtype).size
    taken = least = 0
    for rank in ranks:
        granules = -(-rank // GRANULE_RANK)
        features = [f for shape in SMOLLM2.module_shapes for f in shape] * SMOLLM2.num_layers
        sizes = [GRANULE_RANK * f * dtype.itemsize for f in features] * granules
        taken += place(sizes, block)[1] * block
        least += granules * GRANULE_RANK * sum(features) * dtype.itemsize
    assert taken <= 1.05 * least, f"{taken / least - 1:.1%} over"
