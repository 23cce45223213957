"""Turned queries and keys, and where k and v land in a cache of NaN."""

import pytest
import torch
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.rotary import rotary_and_cache
from torch import Tensor

from tests.kernels.gpu.caches import poisoned
from tests.kernels.inputs import Heads

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HEADS = [
    pytest.param(Heads(3, 3, 64), 16, id="mha64"),
    pytest.param(Heads(9, 3, 64), 48, id="gqa3x64"),
    pytest.param(Heads(8, 2, 80), 16, id="gqa4x80"),
    pytest.param(Heads(7, 1, 128), 32, id="gqa7x128"),
    pytest.param(Heads(8, 1, 96), 16, id="gqa8x96"),
    pytest.param(Heads(4, 2, 256), 16, id="gqa2x256"),
    pytest.param(Heads(2, 1, 16), 16, id="gqa2x16"),
]
NUM_TOKENS, NUM_BLOCKS, PADDING = 7, 5, (0, 4)


def turned(qkv: Tensor, angles: Tensor) -> Tensor:
    """As complex numbers: `(low + i high) e^(i angle)`."""
    low, high = qkv.float().chunk(2, -1)
    product = torch.complex(low, high) * torch.polar(torch.ones(()), angles)[:, None]
    return torch.cat((product.real, product.imag), -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "block_tokens"), HEADS)
def test_rotary_and_cache(heads: Heads, block_tokens: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(7)
    whole = poisoned((NUM_TOKENS + 2, (heads.query + 2 * heads.kv) * heads.dim), dtype)
    before = torch.randn(NUM_TOKENS, heads.query + 2 * heads.kv, heads.dim, generator=rng).to(dtype)
    before[3, -1, 0], before[3, -1, -1] = torch.inf, -torch.inf  # of a value: copied, not computed
    qkv = whole[1:-1]
    qkv.copy_(before.flatten(1))
    angles = torch.rand(NUM_TOKENS, heads.dim // 2, generator=rng) * 100
    cache = poisoned((NUM_BLOCKS, 2, 2, heads.kv, block_tokens, heads.dim), dtype)
    slots = torch.randperm(NUM_BLOCKS * block_tokens, generator=rng)[:NUM_TOKENS]
    slots[list(PADDING)] = -1
    rotary_and_cache(
        launch_now, qkv, angles.cos(), angles.sin(), cache[:, 1, 0], cache[:, 1, 1], slots
    )

    assert whole[[0, -1]].isnan().all()
    after = qkv.view(before.shape)
    expected = turned(before[:, : -heads.kv], angles)
    error = (after[:, : -heads.kv].float() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * expected.abs().max()
    assert torch.equal(after[:, -heads.kv :], before[:, -heads.kv :])
    for token, slot in enumerate(slots.tolist()):
        if token in PADDING:
            continue
        block, offset = divmod(slot, block_tokens)
        cached = cache[block, 1, :, :, offset].clone()  # [k or v, kv_heads, dim]
        assert torch.equal(cached.flatten(0, 1), after[token, heads.query :])
        cache[block, 1, :, :, offset] = torch.nan
    assert cache.isnan().all()
