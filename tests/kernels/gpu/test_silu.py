"""The gated product, gates of every size among them."""

import pytest
import torch
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.silu import BLOCK, silu_mul
from torch import Tensor

from tests.kernels.gpu.caches import poisoned

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GATES = (-3e38, -1e30, -1e4, -104, -89, -88, -20, -1, -1e-30, 0, 1e-30, 0.5, 20, 88, 104, 1e30)


def gated(gate_up: Tensor) -> Tensor:
    """The result, which was NaN between rows of NaN."""
    whole = poisoned((gate_up.shape[0] + 2, gate_up.shape[1] // 2), gate_up.dtype)
    before = gate_up.clone()
    silu_mul(launch_now, gate_up, whole[1:-1])
    assert whole[[0, -1]].isnan().all()
    assert torch.equal(gate_up.view(torch.uint8), before.view(torch.uint8))
    return whole[1:-1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [16, 101, BLOCK, 2 * BLOCK + 3])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(7)
    gate = torch.cat((torch.tensor(GATES), torch.randn(size - len(GATES), generator=rng) * 5))
    gate = gate.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    up = torch.randn(3, size, generator=rng).clamp(-1, 1).to(dtype)
    out = gated(torch.cat((gate.expand_as(up), up), 1))
    expected = gate.double() * torch.sigmoid(gate.double()) * up.double()
    error = (out.double() - expected).abs()
    smallest = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, 1e-30)
    assert (error <= TOLERANCE[dtype] * expected.abs() + smallest).all()


def test_infinite_gates_and_nan() -> None:
    gate_up = torch.ones(2, 2 * 99)
    gate_up[0, :3] = torch.tensor([-torch.inf, torch.inf, torch.nan])
    gate_up[1, 99 + 98] = torch.nan
    out = gated(gate_up)
    assert abs(float(out[0, 0])) < 1e-30
    assert out[0, 1] == torch.inf
    nan = torch.zeros(2, 99, dtype=torch.bool)
    nan[0, 2] = nan[1, 98] = True
    assert torch.equal(out.isnan(), nan)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    gate_up = torch.randn(5, 2 * 99, generator=torch.Generator().manual_seed(7))
    alone = [gated(gate_up[row : row + 1]) for row in range(5)]
    assert torch.equal(torch.cat(alone), gated(gate_up))
