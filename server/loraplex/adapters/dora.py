"""DoRA's output scale, computed once against the base that is served (Liu et al. 2024)."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""So much of a base weight is in float32 at a time."""


def output_scale(base: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """`m / |W + scale * B A|` per output feature, as fp32 [out] on the host.

    base `[out, in]` of any floating type, on its own device; a [rank, in], b [out, rank] and
    magnitude [out] as they were uploaded. All in float32, as PEFT computes them.
    """
    a, b, magnitude = (tensor.to(base.device, torch.float32) for tensor in (a, b, magnitude))
    rows = max(1, CHUNK_ELEMENTS // base.shape[1])
    norms = [
        torch.linalg.vector_norm(part.float() + scale * (of_b @ a), dim=1)
        for part, of_b in zip(torch.split(base, rows), torch.split(b, rows), strict=True)
    ]
    return (magnitude / torch.cat(norms)).cpu()
