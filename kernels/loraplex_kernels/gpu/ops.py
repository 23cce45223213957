"""The Triton kernels behind the common interface; what failed its check goes to torch."""

import torch
from torch import Tensor

from loraplex_kernels.gpu import nf4
from loraplex_kernels.gpu.attention import attention
from loraplex_kernels.gpu.launch import Launch, launch_now
from loraplex_kernels.gpu.lora import lora_
from loraplex_kernels.gpu.norm import add_rms_norm
from loraplex_kernels.gpu.paths import LinearPath, PathTable
from loraplex_kernels.gpu.rotary import rotary_and_cache
from loraplex_kernels.gpu.scale import scale_output_
from loraplex_kernels.gpu.silu import silu_mul
from loraplex_kernels.gpu.workspace import Workspace
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.segments import LONG_TILE_ROWS

KERNELS = (
    "add_rms_norm",
    "rotary_and_cache",
    "attention",
    "silu_mul",
    "lora",
    "scale_output",
    "nf4_linear",
)
"""What `loraplex check` judges one by one, and what `failed` may name."""

NEEDED_FOR_CAPTURE = frozenset(KERNELS) - {"scale_output", "nf4_linear"}
"""Their torch forms allocate, and some loop on the host: nothing for a graph.

No graph holds an output scale, and bitsandbytes is there for the 4-bit product.
"""


class TritonOps(TorchOps):
    """`target` is what the kernels are tuned for: "sm_90", "gfx942", ..., or "interpreter"."""

    name = "triton"
    uses_tiles = True

    def __init__(
        self,
        device: torch.device,
        target: str,
        paths: PathTable,
        failed: frozenset[str] = frozenset(),
        launch: Launch = launch_now,
    ) -> None:
        self.target = target
        self.can_be_captured = not failed & NEEDED_FOR_CAPTURE
        self._failed = failed
        self._paths = paths
        self._launch = launch
        self._workspace = Workspace(device)

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        if "add_rms_norm" in self._failed:
            super().add_rms_norm(residual, delta, weight, eps, out)
        else:
            add_rms_norm(self._launch, residual, delta, weight, eps, out)

    def rotary_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        if "rotary_and_cache" in self._failed:
            super().rotary_and_cache(qkv, cos, sin, k_cache, v_cache, slot_mapping)
        else:
            rotary_and_cache(self._launch, qkv, cos, sin, k_cache, v_cache, slot_mapping)

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        if "attention" in self._failed:
            super().attention(qkv, k_cache, v_cache, where, out, window)
        else:
            attention(
                self._launch,
                qkv,
                k_cache,
                v_cache,
                where,
                out,
                window,
                self._workspace,
                self.target,
            )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        if "silu_mul" in self._failed:
            super().silu_mul(gate_up, out)
        else:
            silu_mul(self._launch, gate_up, out)

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        path = self._path(x, weight)
        if path is LinearPath.FUSED:
            nf4.nf4_linear(
                self._launch,
                x,
                weight.nf4,
                lora,
                layer,
                projections,
                out,
                self._workspace,
                self.target,
            )
            return
        if path is LinearPath.DEQUANTIZED:
            dense = self._workspace.take(
                "dense", (weight.nf4.out_features, weight.nf4.in_features), x.dtype
            )
            nf4.dequantize(self._launch, weight.nf4, dense)
            torch.mm(x, dense.T, out=out)
        else:
            self.base_linear(x, weight, out)
        if lora.has_adapters:
            self.lora_(out, x, lora, layer, projections)

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        if "lora" in self._failed:
            super().lora_(y, x, lora, layer, projections)
        else:
            lora_(self._launch, y, x, lora, layer, projections, self._workspace, self.target)

    def scale_output_(
        self, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
    ) -> None:
        if "scale_output" in self._failed:
            super().scale_output_(y, lora, layer, projections)
        else:
            scale_output_(self._launch, y, lora, layer, projections)

    def _path(self, x: Tensor, weight: BaseWeight) -> LinearPath:
        """As measured; one of our kernels only where it passed and can do it."""
        path = self._paths.choose(weight.nf4.out_features, weight.nf4.in_features, x.shape[0])
        if "nf4_linear" in self._failed:
            return LinearPath.BITSANDBYTES
        if path is not LinearPath.FUSED:
            return path
        is_fit = x.shape[0] <= LONG_TILE_ROWS and nf4.supports(x.dtype, weight.nf4)
        return path if is_fit and "lora" not in self._failed else LinearPath.BITSANDBYTES
