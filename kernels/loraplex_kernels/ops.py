"""The ops a decoder layer is made of, as one interface that each device fills."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import AdapterTables


class Projection(NamedTuple):
    """One module inside a stacked linear: its outputs are columns `column..column + width` of y."""

    module: int  # index in the adapter tables
    column: int
    width: int


@dataclass(frozen=True, slots=True)
class LoraInput:
    """What every LoRA op of a step reads; built once a step by the batch."""

    arena: Tensor  # uint8 [arena bytes]
    dtype: torch.dtype  # of the adapters' weights in the arena
    tables: AdapterTables
    segments: tuple[Segment, ...]
    segment_table: Tensor  # int32 [num_segments, 3]: slot, lo, hi; the same on the device


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Which cached keys each row may see; built once a step by the batch.

    The first `num_decode` sequences have one query each, so that row i is sequence i.
    """

    num_decode: int
    query_starts: Sequence[int]  # [num_sequences + 1], rows of the batch
    context_lens: Sequence[int]  # [num_sequences], keys the last query sees
    context_table: Tensor  # int32 [num_sequences], the same on the device
    block_tables: Tensor  # int32 [num_sequences, max_blocks]


class Ops(Protocol):
    """Everything between two matrix products of a decoder layer.

    `k_cache`, `v_cache` are one layer's views into the arena, `[num_blocks, kv_heads, block_tokens,
    head_dim]`. Activations are `[num_tokens, features]`, row-major.
    """

    name: str

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """`residual += delta`, then `weight * residual / sqrt(mean(residual^2) + eps)` as `dtype`.

        Zhang & Sennrich 2019. residual fp32 [T, H], changed in place; the statistics are fp32.
        """

    def rotary_and_cache(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Turn q and k by their positions in place, then write k and v where `slot_mapping` says.

        Rotary embedding of Su et al. 2021 in the half-split form of Llama checkpoints. qkv
        [T, (heads + 2 kv_heads) * head_dim]; cos, sin fp32 [T, head_dim / 2]; slot_mapping int64
        [T], block * block_tokens + offset.
        """

    def attention(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, where: AttentionInput
    ) -> Tensor:
        """Causal grouped-query attention over the paged cache; `[T, heads * head_dim]`."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` for gate_up `[T, 2 I]`; `[T, I]`."""

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        """`y[t, p] += scale * B (A x[t])` for every row t with an adapter, every projection p.

        Segmented low-rank products as in Punica (Chen et al. 2023), with each adapter's own rank:
        sums over its granules of 16. Accumulated in fp32, y rounded once; the torch form rounds
        each product to the weights' type, as PEFT does. x [T, K], y [T, N].
        """
