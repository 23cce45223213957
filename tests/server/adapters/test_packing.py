"""Packed adapters hold the uploaded matrices, tightly, and wherever the blocks happen to lie."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapters.packing import (
    ALIGNMENT,
    Layout,
    PackedAdapter,
    open_packed,
    pack,
    place,
    save_packed,
)
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config
from loraplex.engine.model_runner import block_shape
from loraplex.errors import AdapterInvalidError
from loraplex.model.config import MODULES, ModelConfig, Rope
from loraplex_kernels.tables import GRANULE_RANK, AdapterTables, view
from safetensors.torch import save_file
from torch import Tensor

LAYOUT = Layout(block_bytes=16384, dtype=torch.bfloat16)
SHAPES = {"q_proj": (64, 96), "k_proj": (32, 96), "down_proj": (96, 200)}
RANKS = {"q_proj": 5, "k_proj": 40, "down_proj": 16}
ALPHA = 24
LINEARS = {
    linear.name: linear
    for layer in range(2)
    for module, (out_features, in_features) in SHAPES.items()
    for linear in [
        BaseLinear(f"model.layers.{layer}.{module}", layer, module, out_features, in_features)
    ]
}


def upload(
    folder: Path, dtype: torch.dtype, scale: float = 1.0
) -> tuple[AdapterSpec, dict[str, Tensor]]:
    """A real upload, validated: ranks by module, one module of layer 1 left out."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, linear in LINEARS.items():
        if name != "model.layers.1.q_proj":
            rank = RANKS[linear.module]
            for side, shape in (
                ("A", (rank, linear.in_features)),
                ("B", (linear.out_features, rank)),
            ):
                matrix = torch.randn(shape, generator=generator) * scale
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = matrix.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": ALPHA, "rank_pattern": RANKS}
    spec = read_adapter(
        folder / "adapter_model.safetensors", read_config(json.dumps(config), 64), LINEARS, 64
    )
    return spec, tensors


def matrices(
    packed: PackedAdapter, blocks: list[int]
) -> dict[tuple[int, str], tuple[Tensor, Tensor, float]]:
    """A and B^T with all their ranks and the scale, found through tables over a shuffled arena."""
    size = packed.data.shape[1]
    arena = torch.full(((max(blocks) + 1) * size,), 0xFF, dtype=torch.uint8)
    for source, block in zip(packed.data, blocks, strict=True):
        arena[block * size : (block + 1) * size] = source
    tables = AdapterTables(1, 2, len(MODULES), 64, torch.device("cpu"))
    tables.write(0, packed.placed(blocks))
    found = {}
    for linear in LINEARS.values():
        granules = tables.granules(0, linear.layer, MODULES.index(linear.module))
        if granules:
            a = [
                view(arena, at, GRANULE_RANK, linear.in_features, LAYOUT.dtype)
                for at, _, _ in granules
            ]
            b = [
                view(arena, at, GRANULE_RANK, linear.out_features, LAYOUT.dtype)
                for _, at, _ in granules
            ]
            (scale,) = {scale for _, _, scale in granules}
            found[linear.layer, linear.module] = (torch.cat(a), torch.cat(b), scale)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    spec, tensors = upload(tmp_path, dtype)
    packed = pack(tmp_path / "adapter_model.safetensors", spec, LAYOUT)
    save_packed(packed, tmp_path / "packed.safetensors")
    again = open_packed(tmp_path / "packed.safetensors")
    assert again.granules == packed.granules
    assert torch.equal(again.data, packed.data)

    blocks = [7, 1, 4, 9, 2, 0, 12, 5][: again.num_blocks]
    found = matrices(again, blocks)
    assert found.keys() == {(x.layer, x.module) for x in LINEARS.values()} - {(1, "q_proj")}
    for (layer, module), (a, b_transposed, scale) in found.items():
        rank, name = RANKS[module], f"base_model.model.model.layers.{layer}.{module}"
        assert a.shape[0] == -(-rank // GRANULE_RANK) * GRANULE_RANK
        assert torch.equal(a[:rank], tensors[f"{name}.lora_A.weight"].to(LAYOUT.dtype))
        assert torch.equal(b_transposed[:rank].T, tensors[f"{name}.lora_B.weight"].to(LAYOUT.dtype))
        assert not a[rank:].any()
        assert not b_transposed[rank:].any()
        assert scale == pytest.approx(ALPHA / rank)


def test_values_that_the_servers_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    spec, _ = upload(tmp_path, torch.float32, scale=1e30)
    with pytest.raises(AdapterInvalidError, match="float16 cannot hold"):
        pack(tmp_path / "adapter_model.safetensors", spec, Layout(16384, torch.float16))


def test_the_fingerprint_is_the_layouts() -> None:
    layouts = [Layout(size, d) for size in (4096, 8192) for d in (torch.bfloat16, torch.float32)]
    assert len({layout.fingerprint for layout in layouts}) == 4
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
