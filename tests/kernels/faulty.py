"""Torch's ops with one deliberate mistake, for what must find it."""

from collections.abc import Callable

import torch
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from torch import Tensor

Fault = Callable[[Tensor], None]
"""Does something to an output that was just computed rightly."""


def is_a_little_wrong(out: Tensor) -> None:
    out.view(-1)[out.numel() // 2] += 0.5


def forgets_a_value(out: Tensor) -> None:
    out.view(-1)[-1] = torch.nan


def raises(out: Tensor) -> None:
    raise RuntimeError("out of resource: shared memory\n  a second line")


def writes_before(out: Tensor) -> None:
    _allocation(out)[out.storage_offset() * out.itemsize - 1] = 0


def writes_behind(out: Tensor) -> None:
    _allocation(out)[out.storage_offset() * out.itemsize + out.nbytes] = 0


def _allocation(out: Tensor) -> Tensor:
    """All the bytes of the buffer that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())


FAULTS: dict[Fault, str] = {
    is_a_little_wrong: "off by ",
    forgets_a_value: "a result that is not finite, or was not written",
    raises: "RuntimeError: out of resource: shared memory",
    writes_before: "wrote outside its output",
    writes_behind: "wrote outside its output",
}
"""With what the check says of each."""


class FaultyOps(TorchOps):
    """One kernel has the fault; the others are right, also where torch makes one from another."""

    def __init__(self, kernel: str, fault: Fault) -> None:
        self._kernel = kernel
        self._fault = fault

    def _after(self, kernel: str, out: Tensor) -> None:
        if kernel == self._kernel:
            self._fault(out)

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        super().add_rms_norm(residual, delta, weight, eps, out)
        self._after("add_rms_norm", out)

    def rotary_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        super().rotary_and_cache(qkv, cos, sin, k_cache, v_cache, slot_mapping)
        self._after("rotary_and_cache", qkv)

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        super().attention(qkv, k_cache, v_cache, where, out, window)
        self._after("attention", out)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        super().silu_mul(gate_up, out)
        self._after("silu_mul", out)

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        TorchOps().linear(x, weight, lora, layer, projections, out)
        self._after("nf4_linear", out)

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        super().lora_(y, x, lora, layer, projections)
        self._after("lora", y)

    def scale_output_(
        self, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
    ) -> None:
        super().scale_output_(y, lora, layer, projections)
        self._after("scale_output", y)
