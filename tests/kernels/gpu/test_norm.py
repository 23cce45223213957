"""RMSNorm with the residual's update, for rows of very different size."""

import pytest
import torch
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.norm import add_rms_norm
from torch import Tensor

from tests.kernels.gpu.caches import poisoned

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPS = 1e-5


def normed(
    residual: Tensor, delta: Tensor | None, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The new residual and the result, between rows of NaN before and after."""
    whole = poisoned((residual.shape[0] + 2, residual.shape[1]), dtype)
    stream = poisoned(whole.shape, torch.float32)
    stream[1:-1] = residual
    add_rms_norm(launch_now, stream[1:-1], delta, weight, EPS, whole[1:-1])
    assert whole[[0, -1]].isnan().all()
    assert stream[[0, -1]].isnan().all()
    return stream[1:-1], whole[1:-1]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_delta", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (5, 576), (2, 16384)])
def test_add_rms_norm(
    shape: tuple[int, int], has_delta: bool, dtype: torch.dtype, rng: torch.Generator
) -> None:
    residual = torch.randn(shape, generator=rng) * 10
    residual[0] *= 1000
    if shape[0] > 2:
        residual[-1] = 0.0
    delta = torch.randn(shape, generator=rng).to(dtype) if has_delta else None
    weight = torch.randn(shape[1], generator=rng)
    summed = residual if delta is None else residual + delta.float()
    mean = summed.double().square().mean(-1, keepdim=True)
    expected = summed.double() / (mean + EPS).sqrt() * weight

    changed, out = normed(residual, delta, weight, dtype)
    assert torch.equal(changed, summed)
    error = (out.double() - expected).abs().amax(1)
    assert (error <= TOLERANCE[dtype] * expected.abs().amax(1)).all()


def test_a_row_does_not_depend_on_its_neighbours(rng: torch.Generator) -> None:
    residual = torch.randn(4, 100, generator=rng)
    delta = torch.randn(4, 100, generator=rng).half()
    weight = torch.randn(100, generator=rng)
    together = normed(residual, delta, weight, torch.float16)
    for row in range(4):
        alone = normed(residual[row : row + 1], delta[row : row + 1], weight, torch.float16)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_a_nan_stays_in_its_row(rng: torch.Generator) -> None:
    residual = torch.randn(3, 100, generator=rng)
    residual[1, 7] = torch.nan
    _, out = normed(residual, None, torch.ones(100), torch.float32)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()
