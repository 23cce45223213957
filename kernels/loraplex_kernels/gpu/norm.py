"""The residual's update and RMSNorm: one launch, a program a row."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch


@triton.jit
def _add_rms_norm(
    residual,  # fp32 [T, SIZE], updated in place
    delta,  # [T, SIZE] or None
    weight,  # [SIZE]
    out,  # [T, SIZE]
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # SIZE, up to a power of two: the whole row in registers
):
    """Grid (T,)."""
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(residual + at, mask=mask, other=0.0)
    if delta is not None:
        x += tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual + at, x, mask=mask)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = x * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=mask)


def add_rms_norm(
    launch: Launch, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """As `ops.Ops.add_rms_norm`; all contiguous, rows of up to 16384."""
    rows = [residual, out] if delta is None else [residual, out, delta]
    assert all(tensor.is_contiguous() for tensor in rows)
    num_tokens, size = residual.shape
    block = triton.next_power_of_2(size)
    num_warps = min(max(block // 512, 1), 16)  # sixteen values a thread, more in the longest rows
    constants = {"SIZE": size, "BLOCK": block, "num_warps": num_warps}
    launch(_add_rms_norm, (num_tokens,), residual, delta, weight, out, eps, **constants)
