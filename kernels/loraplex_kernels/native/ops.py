"""The compiled ops behind the common interface; whatever they do not cover goes to torch."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.reference import TorchOps

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}

LONG_SEGMENT = 96
"""Rows from which one segment's LoRA is quicker as two matrix products (bf16, measured)."""


@lru_cache(maxsize=256)
def _projection_table(projections: tuple[Projection, ...]) -> "ctypes.Array[c_int64]":
    flat = [number for projection in projections for number in projection]
    return (c_int64 * len(flat))(*flat)


class NativeOps(TorchOps):
    """CPU ops through plain pointers; activations and stored weights share one dtype."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        """Uses as many threads as torch was told to, whichever thread calls."""
        self._library = library
        library.loraplex_set_num_threads(torch.get_num_threads())

    def _call(self, name: str, dtype: torch.dtype, *arguments: object) -> None:
        getattr(self._library, f"loraplex_{name}_{_SUFFIX[dtype]}")(*arguments)

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        out = torch.empty(residual.shape, dtype=dtype)
        self._call(
            "add_rms_norm",
            dtype,
            c_void_p(residual.data_ptr()),
            c_void_p(None if delta is None else delta.data_ptr()),
            c_void_p(weight.data_ptr()),
            c_void_p(out.data_ptr()),
            c_int64(residual.shape[0]),
            c_int64(residual.shape[1]),
            c_float(eps),
        )
        return out

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
            c_void_p(qkv.data_ptr()),
            c_void_p(cos.data_ptr()),
            c_void_p(sin.data_ptr()),
            c_void_p(k_cache.data_ptr()),
            c_void_p(v_cache.data_ptr()),
            c_void_p(slot_mapping.data_ptr()),
            c_int64(qkv.shape[0]),
            c_int64(qkv.shape[1] // head_dim - 2 * num_kv_heads),
            c_int64(k_cache.stride(0)),
            c_int64(num_kv_heads),
            c_int64(block_tokens),
            c_int64(head_dim),
        )

    def attention(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, where: AttentionInput
    ) -> Tensor:
        num_kv_heads, block_tokens, head_dim = k_cache.shape[1:]
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        out = torch.empty(qkv.shape[0], num_heads, head_dim, dtype=qkv.dtype)
        if where.num_decode:
            self._call(
                "attention",
                qkv.dtype,
                c_void_p(qkv.data_ptr()),
                c_void_p(k_cache.data_ptr()),
                c_void_p(v_cache.data_ptr()),
                c_void_p(out.data_ptr()),
                c_void_p(where.block_tables.data_ptr()),
                c_int64(where.block_tables.shape[1]),
                c_void_p(where.context_table.data_ptr()),
                c_int64(where.num_decode),
                c_int64(num_heads),
                c_int64(k_cache.stride(0)),
                c_int64(num_kv_heads),
                c_int64(block_tokens),
                c_int64(head_dim),
            )
        q = qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]
        for i in range(where.num_decode, len(where.context_lens)):
            lo, hi = where.query_starts[i], where.query_starts[i + 1]
            self.attend_one(q, k_cache, v_cache, where, i, out[lo:hi])
        return out.view(qkv.shape[0], -1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype)
        self._call(
            "silu_mul",
            gate_up.dtype,
            c_void_p(gate_up.data_ptr()),
            c_void_p(out.data_ptr()),
            c_int64(rows),
            c_int64(size),
        )
        return out

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        for segment in lora.segments:
            if segment.hi - segment.lo >= LONG_SEGMENT:
                self.lora_segment_(y, x, lora, layer, projections, segment)
        tables = lora.tables
        _, layers, modules, granules = tables.scale.shape
        self._call(
            "lora",
            y.dtype,
            c_void_p(y.data_ptr()),
            c_int64(y.stride(0)),
            c_void_p(x.data_ptr()),
            c_int64(x.shape[1]),
            c_void_p(lora.arena.data_ptr()),
            c_void_p(tables.offset.data_ptr()),
            c_void_p(tables.scale.data_ptr()),
            c_void_p(tables.num_granules.data_ptr()),
            c_int64(layers),
            c_int64(modules),
            c_int64(granules),
            c_void_p(lora.segment_table.data_ptr()),
            c_int64(lora.segment_table.shape[0]),
            c_int64(LONG_SEGMENT),
            c_int64(layer),
            _projection_table(projections),
            c_int64(len(projections)),
        )
