"""The compiled ops behind the common interface; whatever they do not cover goes to torch."""

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_float, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.native.stack import NativeStack, is_covered
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.stack import LayerStack, Stack

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}

_POINTER, _COUNT = c_void_p, c_int64
_CACHE_SHAPE = (_COUNT,) * 4  # elements a block, kv_heads, block_tokens, head_dim
# What each function of ops.cpp takes, in order; declared once, so that calls need no conversion.
_ARGUMENTS: Mapping[str, tuple[type, ...]] = {
    "add_rms_norm": (*(_POINTER,) * 4, *(_COUNT,) * 2, c_float),
    "rotary_and_cache": (*(_POINTER,) * 6, *(_COUNT,) * 2, *_CACHE_SHAPE),
    "attention": (*(_POINTER,) * 5, _COUNT, *(_POINTER,) * 2, *(_COUNT,) * 3, *_CACHE_SHAPE),
    "silu_mul": (*(_POINTER,) * 2, *(_COUNT,) * 2),
    "lora": (
        *(_POINTER, _COUNT) * 2,
        *(_POINTER,) * 4,
        *(_COUNT,) * 3,
        _POINTER,
        *(_COUNT,) * 2,
        _POINTER,
        _COUNT,
    ),
    "scale_output": (
        *(_POINTER, _COUNT),
        *(_POINTER,) * 2,
        *(_COUNT,) * 2,
        *(_POINTER, _COUNT),
        _COUNT,
        *(_POINTER, _COUNT),
    ),
}


def _declared(library: ctypes.CDLL, name: str, kinds: tuple[type, ...]) -> Callable[..., None]:
    function = library[name]
    function.argtypes = kinds
    function.restype = None
    return function


def _nf4_linear(library: ctypes.CDLL) -> Callable[..., None] | None:
    """None where the processor has no matrix tiles, or the system does not hand them out."""
    if not library.loraplex_has_amx():
        return None
    return _declared(library, "loraplex_nf4_linear", (*(_POINTER,) * 5, *(_COUNT,) * 3))


@lru_cache(maxsize=256)
def _projection_table(projections: tuple[Projection, ...]) -> "ctypes.Array[c_int64]":
    flat = [number for projection in projections for number in projection]
    return (c_int64 * len(flat))(*flat)


class NativeOps(TorchOps):
    """CPU ops through plain pointers; activations and stored weights share one dtype."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        """Uses as many threads as torch was told to, whichever thread calls."""
        library.loraplex_set_num_threads(torch.get_num_threads())
        self._library = library
        self._nf4_linear = _nf4_linear(library)
        self._functions = {
            (name, dtype): _declared(library, f"loraplex_{name}_{suffix}", kinds)
            for name, kinds in _ARGUMENTS.items()
            for dtype, suffix in _SUFFIX.items()
        }

    @property
    def multiplies_codes(self) -> bool:
        """Whether products in bf16 are computed from the 4-bit codes by matrix tiles."""
        return self._nf4_linear is not None

    def granule_form(self, dtype: torch.dtype) -> GranuleForm:
        is_tiled = self.multiplies_codes and dtype == torch.bfloat16
        return GranuleForm.OPERANDS if is_tiled else GranuleForm.ROWS

    def fuse(self, stack: Stack) -> LayerStack | None:
        if not self.multiplies_codes or not is_covered(stack):
            return None
        return NativeStack(self._library, stack)

    def base_linear(self, x: Tensor, weight: BaseWeight, out: Tensor) -> None:
        is_covered = weight.dense is None and x.dtype == torch.bfloat16
        if self._nf4_linear is None or not is_covered:
            super().base_linear(x, weight, out)
            return
        nf4 = weight.nf4
        self._nf4_linear(
            x.data_ptr(),
            nf4.codes.data_ptr(),
            nf4.absmax.data_ptr(),
            nf4.code.data_ptr(),
            out.data_ptr(),
            len(x),
            nf4.out_features,
            nf4.in_features,
        )

    def _call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        self._functions[name, dtype](*arguments)

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        self._call(
            "add_rms_norm",
            out.dtype,
            residual.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            residual.shape[0],
            residual.shape[1],
            eps,
        )

    def rotary_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        num_kv_heads, block_tokens, head_dim = k_cache.shape[1:]
        self._call(
            "rotary_and_cache",
            qkv.dtype,
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            qkv.shape[0],
            qkv.shape[1] // head_dim - 2 * num_kv_heads,
            k_cache.stride(0),
            num_kv_heads,
            block_tokens,
            head_dim,
        )

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        num_kv_heads, block_tokens, head_dim = k_cache.shape[1:]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        starts = where.query_start_table
        if starts is None and where.num_decode < len(where.context_lens):
            starts = torch.tensor(where.query_starts, dtype=torch.int32)
        self._call(
            "attention",
            qkv.dtype,
            qkv.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            where.block_tables.data_ptr(),
            where.block_tables.shape[1],
            where.context_table.data_ptr(),
            None if starts is None else starts.data_ptr(),
            len(where.context_lens),
            num_heads,
            0 if window is None else window,
            k_cache.stride(0),
            num_kv_heads,
            block_tokens,
            head_dim,
        )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        rows, size = out.shape
        self._call(
            "silu_mul",
            gate_up.dtype,
            gate_up.data_ptr(),
            out.data_ptr(),
            rows,
            size,
        )

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        tables = lora.tables
        assert lora.segment_table is not None
        assert lora.form is self.granule_form(lora.dtype)
        _, layers, modules, granules = tables.scale.shape
        self._call(
            "lora",
            y.dtype,
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.shape[1],
            lora.arena.data_ptr(),
            tables.offset.data_ptr(),
            tables.scale.data_ptr(),
            tables.num_granules.data_ptr(),
            layers,
            modules,
            granules,
            lora.segment_table.data_ptr(),
            lora.segment_table.shape[0],
            layer,
            _projection_table(projections),
            len(projections),
        )

    def scale_output_(
        self, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
    ) -> None:
        assert lora.segment_table is not None
        _, layers, modules = lora.tables.output_scale.shape
        self._call(
            "scale_output",
            y.dtype,
            y.data_ptr(),
            y.stride(0),
            lora.arena.data_ptr(),
            lora.tables.output_scale.data_ptr(),
            layers,
            modules,
            lora.segment_table.data_ptr(),
            lora.segment_table.shape[0],
            layer,
            _projection_table(projections),
            len(projections),
        )
