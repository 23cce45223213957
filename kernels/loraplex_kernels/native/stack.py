"""The stack of layers as one native call: stack.h, and the structs it reads."""

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from types import MappingProxyType

import torch
from torch import Tensor

from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.stack import Stack, StackedLinear, StackStep, StepLimits

PHASES = (
    "norm",
    "shrink",
    "qkv",
    "attention",
    "pack",
    "o",
    "gate_up",
    "down",
    "head",
)
"""Parts of a step, in the order of stack.h's `Phase`. `shrink` is the whole low-rank update where
few rows have the same adapter, its first half elsewhere."""


class _Weight(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("absmax", c_void_p),
        ("levels", c_void_p),
        ("dense", c_void_p),
        ("outputs", c_int64),
        ("k", c_int64),
    )


class _Projection(Structure):
    _fields_ = (("module", c_int64), ("column", c_int64), ("width", c_int64))


class _Linear(Structure):
    _fields_ = (
        ("weight", _Weight),
        ("bias", c_void_p),
        ("projections", POINTER(_Projection)),
        ("num_projections", c_int64),
    )


class _Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", _Linear),
        ("o", _Linear),
        ("post_attention_norm", c_void_p),
        ("gate_up", _Linear),
        ("down", _Linear),
    )


class _Model(Structure):
    _fields_ = (
        ("layers", POINTER(_Layer)),
        *((name, c_int64) for name in ("num_layers", "hidden", "intermediate")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", c_double),
        ("norm", c_void_p),
        ("head", _Weight),
    )


class _Step(Structure):
    _fields_ = (
        *(("rows", c_int64), ("num_logits", c_int64)),
        *((name, c_void_p) for name in ("residual", "cos", "sin", "slots", "logits_rows")),
        *((name, c_void_p) for name in ("normed", "qkv", "attended", "last_normed")),
        *((name, c_void_p) for name in ("logits", "tokens", "kv_cache")),
        *((name, c_int64) for name in ("stride_block", "block_tokens")),
        *((name, c_void_p) for name in ("block_tables", "contexts", "query_starts")),
        *((name, c_int64) for name in ("max_blocks", "num_sequences")),
        *((name, c_void_p) for name in ("arena", "offset", "scale", "num_granules")),
        *((name, c_int64) for name in ("table_layers", "modules", "granules")),
        *(("segments", c_void_p), ("num_segments", c_int64)),
        *(("output_scale", c_void_p), ("nanoseconds", c_void_p)),
    )


class NativeStack:
    """A `LayerStack` in bf16. Mutable: its scratch memory, and `_times` while it is profiled."""

    def __init__(self, library: ctypes.CDLL, stack: Stack) -> None:
        self._stack = stack  # keeps alive what the structs point to
        self._projections: list[object] = []
        layers = (_Layer * len(stack.layers))(
            *(
                _Layer(
                    input_norm=layer.input_norm.data_ptr(),
                    qkv=self._linear(layer.qkv),
                    o=self._linear(layer.o),
                    post_attention_norm=layer.post_attention_norm.data_ptr(),
                    gate_up=self._linear(layer.gate_up),
                    down=self._linear(layer.down),
                )
                for layer in stack.layers
            )
        )
        self._layers = layers
        model = _Model(
            layers=layers,
            num_layers=len(stack.layers),
            hidden=stack.head.shape[1],
            intermediate=stack.layers[0].down.weight.nf4.in_features,
            heads=stack.num_heads,
            kv_heads=stack.num_kv_heads,
            head_dim=stack.head_dim,
            eps=stack.eps,
            norm=stack.norm.data_ptr(),
            head=_Weight(
                dense=stack.head.data_ptr(), outputs=len(stack.head), k=stack.head.shape[1]
            ),
        )
        new = library.loraplex_stack_new
        new.argtypes, new.restype = (POINTER(_Model),), c_void_p
        self._run = library.loraplex_stack_run
        self._run.argtypes, self._run.restype = (c_void_p, POINTER(_Step)), None
        self._delete = library.loraplex_stack_delete
        self._delete.argtypes, self._delete.restype = (c_void_p,), None
        self._bytes = library.loraplex_stack_bytes
        self._bytes.argtypes, self._bytes.restype = (c_void_p, *(c_int64,) * 5), c_int64
        self._native = new(model)
        self._times: Tensor | None = None

    def __del__(self) -> None:
        if hasattr(self, "_native"):
            self._delete(self._native)

    def _linear(self, linear: StackedLinear) -> _Linear:
        weight, projections = linear.weight.nf4, linear.projections
        table = (_Projection * len(projections))(*(_Projection(*p) for p in projections))
        self._projections.append(table)
        return _Linear(
            weight=_Weight(
                codes=weight.codes.data_ptr(),
                absmax=weight.absmax.data_ptr(),
                levels=weight.code.data_ptr(),
                outputs=weight.out_features,
                k=weight.in_features,
            ),
            bias=None if linear.bias is None else linear.bias.data_ptr(),
            projections=table,
            num_projections=len(projections),
        )

    def num_bytes(self, limits: StepLimits) -> int:
        return int(
            self._bytes(
                self._native,
                limits.max_rows,
                limits.max_logits,
                limits.max_sequences,
                limits.context_length,
                -(-limits.max_rank // GRANULE_RANK),
            )
        )

    def run(self, step: StackStep) -> None:
        where, lora, cache = step.attention, step.lora, step.kv_cache
        starts = where.query_start_table
        if starts is None:
            starts = torch.tensor(where.query_starts, dtype=torch.int32)
        native = _Step(
            rows=len(step.residual),
            num_logits=len(step.logits_rows),
            residual=step.residual.data_ptr(),
            cos=step.cos.data_ptr(),
            sin=step.sin.data_ptr(),
            slots=step.slot_mapping.data_ptr(),
            logits_rows=step.logits_rows.data_ptr(),
            normed=step.normed.data_ptr(),
            qkv=step.qkv.data_ptr(),
            attended=step.attended.data_ptr(),
            last_normed=step.last_normed.data_ptr(),
            logits=step.logits.data_ptr(),
            tokens=None if step.tokens is None else step.tokens.data_ptr(),
            kv_cache=cache.data_ptr(),
            stride_block=cache.stride(0),
            block_tokens=cache.shape[4],
            block_tables=where.block_tables.data_ptr(),
            contexts=where.context_table.data_ptr(),
            query_starts=starts.data_ptr(),
            max_blocks=where.block_tables.shape[1],
            num_sequences=len(where.context_lens),
            nanoseconds=None if self._times is None else self._times.data_ptr(),
        )
        if lora.has_adapters:
            assert lora.segment_table is not None
            assert lora.form is GranuleForm.OPERANDS
            tables = lora.tables
            native.arena = lora.arena.data_ptr()
            native.offset = tables.offset.data_ptr()
            native.scale = tables.scale.data_ptr()
            native.num_granules = tables.num_granules.data_ptr()
            _, native.table_layers, native.modules, native.granules = tables.scale.shape
            native.segments = lora.segment_table.data_ptr()
            native.num_segments = len(lora.segment_table)
            if lora.has_output_scales:
                native.output_scale = tables.output_scale.data_ptr()
        self._run(self._native, native)

    def start_profile(self) -> None:
        """From now on the time of each phase is added up."""
        self._times = torch.zeros(len(PHASES), dtype=torch.int64)

    def profile(self) -> Mapping[str, float]:
        """Seconds in each of PHASES since then."""
        assert self._times is not None
        seconds = (self._times / 1e9).tolist()
        return MappingProxyType(dict(zip(PHASES, seconds, strict=True)))


def is_covered(stack: Stack) -> bool:
    """4-bit weights without a dense copy, whose outputs are all some projection's, and bf16 beside
    them."""
    linears = [
        linear
        for layer in stack.layers
        for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
    ]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return (
        all(linear.weight.dense is None for linear in linears)
        and all(t.dtype == torch.bfloat16 for t in (stack.head, *biases))
        and all(len(linear.projections) <= 3 for linear in linears)
        and all(
            sum(projection.width for projection in linear.projections)
            == linear.weight.nf4.out_features
            for linear in linears
        )
    )
