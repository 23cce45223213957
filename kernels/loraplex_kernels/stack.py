"""All of a decoder's layers as one op, for ops that have such a form.

The loop over the layers in the decoder is what it must compute, and takes over wherever it does not
apply.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops, Projection


class StackedLinear(Protocol):
    """`y = c * (W x + s B A x) + b`, as the decoder's linears are."""

    @property
    def weight(self) -> BaseWeight: ...
    @property
    def bias(self) -> Tensor | None: ...  # [out]
    @property
    def projections(self) -> tuple[Projection, ...]: ...


class StackLayer(Protocol):
    """Norm weights fp32 [hidden]; q,k,v and gate,up stacked into one linear each."""

    @property
    def input_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> StackedLinear: ...
    @property
    def o(self) -> StackedLinear: ...
    @property
    def post_attention_norm(self) -> Tensor: ...
    @property
    def gate_up(self) -> StackedLinear: ...
    @property
    def down(self) -> StackedLinear: ...


@dataclass(frozen=True, slots=True)
class Stack:
    """What does not change from step to step."""

    layers: Sequence[StackLayer]
    norm: Tensor  # fp32 [hidden]
    head: Tensor  # [vocab, hidden]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class StackStep:
    """One step of T rows, L of them with logits; memory that is written is contiguous."""

    residual: Tensor  # fp32 [T, hidden]: the embedded tokens; what it holds afterwards is nobody's
    cos: Tensor  # fp32 [T, head_dim / 2]
    sin: Tensor
    kv_cache: Tensor  # [num_blocks, layers, 2, kv_heads, block_tokens, head_dim], written
    slot_mapping: Tensor  # int64 [T], as in Ops.rotary_and_cache
    attention: AttentionInput
    lora: LoraInput
    logits_rows: Tensor  # int64 [L]
    normed: Tensor  # [T, hidden], for intermediate results, as the three below
    qkv: Tensor  # [T, (heads + 2 kv_heads) * head_dim]
    attended: Tensor  # [T, heads * head_dim]
    last_normed: Tensor  # [L, hidden], written: what the head reads
    logits: Tensor  # fp32 [L, vocab], written; nobody's where there are tokens
    tokens: Tensor | None  # int64 [L], the largest logits', written; -1: one is not finite


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large steps get."""

    max_rows: int
    max_logits: int
    max_sequences: int
    context_length: int
    max_rank: int


class LayerStack(Protocol):
    """A stack made ready to run. Mutable: its scratch memory; one step at a time."""

    def run(self, step: StackStep) -> None:
        """Every layer, the final norm, and the head of the wanted rows, or its largest logits."""

    def num_bytes(self, limits: StepLimits) -> int:
        """What its own memory comes to, at most, with steps within these limits."""


@runtime_checkable
class Fuses(Protocol):
    """Ops that may have one op for all layers."""

    def fuse(self, stack: Stack) -> LayerStack | None:
        """None where the weights' form or type is not covered."""


def fuse(stack: Stack, ops: Ops) -> LayerStack | None:
    """The stack as one op, where these ops have it."""
    return ops.fuse(stack) if isinstance(ops, Fuses) else None
