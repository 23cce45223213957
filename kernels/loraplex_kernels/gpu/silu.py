"""SiLU-gated product: one launch, a program a row and a block of its columns."""

import triton
import triton.language as tl
from torch import Tensor

from loraplex_kernels.gpu.launch import Launch

BLOCK = 2048  # whole 128-bit accesses with four warps, of 64 threads too


@triton.jit
def _silu_mul(
    gate_up,  # [T, 2 * SIZE]
    out,  # [T, SIZE]
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(SIZE / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate_at = gate_up + row * (2 * SIZE) + column
    gate = tl.load(gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_at + SIZE, mask=mask, other=0.0).to(tl.float32)
    # So that e^-gate stays finite, a gate of -inf too; silu(-87) is under 1e-35.
    gate = tl.maximum(gate, -87.0, propagate_nan=tl.PropagateNan.ALL)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + column, product.to(out.dtype.element_ty), mask=mask)


def silu_mul(launch: Launch, gate_up: Tensor, out: Tensor) -> None:
    """As `ops.Ops.silu_mul`, in fp32, rounded once; both contiguous."""
    assert all(tensor.is_contiguous() for tensor in (gate_up, out))
    num_tokens, size = out.shape
    grid = (num_tokens, triton.cdiv(size, BLOCK))
    launch(_silu_mul, grid, gate_up, out, SIZE=size, BLOCK=BLOCK, num_warps=4)
