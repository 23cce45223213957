"""The ops a decoder layer is made of, as one interface that each device fills."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import AdapterTables

QUERY_TILE = 16
"""Query tokens in a tile of `AttentionInput.query_tiles`."""


class Projection(NamedTuple):
    """One module inside a stacked linear: its outputs are columns `column..column + width` of y."""

    module: int  # index in the adapter tables
    column: int
    width: int


class LoraTiles(NamedTuple):
    """`segments.Tiles` on the device; lists may be longer than used, filled up with slot -1."""

    short: Tensor  # int32 [capacity, 3]: slot, lo, hi
    starts: Tensor  # int32 [ceil(num_rows / TILE_ROWS) + 1]
    long: Tensor  # int32 [capacity, 3]; capacity 0 where no segment is long


@dataclass(frozen=True, slots=True)
class LoraInput:
    """What every LoRA op of a step reads; built once a step by the batch."""

    arena: Tensor  # uint8 [arena bytes]
    dtype: torch.dtype  # of the adapters' weights in the arena
    form: GranuleForm  # in which they lie there
    tables: AdapterTables
    has_adapters: bool  # False: no row has one, so that nothing need be done
    has_output_scales: bool  # whether a row's adapter scales outputs (DoRA)
    segments: tuple[Segment, ...]  # for ops that loop on the host
    segment_table: Tensor | None  # int32 [num_segments, 3]: slot, lo, hi; the same on the device
    tiles: LoraTiles | None  # instead of it, for ops that ask for them


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Which cached keys each row may see; built once a step by the batch.

    The first `num_decode` sequences have one query each, so that row i is sequence i. A sequence
    with context 0 is padding: its row's output is zero.
    """

    num_decode: int
    query_starts: Sequence[int]  # [num_sequences + 1], rows of the batch
    context_lens: Sequence[int]  # [num_sequences], keys the last query sees
    context_table: Tensor  # int32 [num_sequences], the same on the device
    block_tables: Tensor  # int32 [num_sequences, max_blocks]
    query_start_table: Tensor | None  # int32 [num_sequences + 1]; None where not asked for
    query_tiles: Tensor | None  # int32 [n, 2]: sequence, its first query; sequences of many queries


class Ops(Protocol):
    """Everything a decoder layer computes. Results are written into `out`, contiguous.

    `k_cache`, `v_cache` are one layer's views into the arena, `[num_blocks, kv_heads, block_tokens,
    head_dim]`. Activations are `[num_tokens, features]`, row-major.
    """

    name: str
    uses_tiles: bool  # whether `LoraInput.tiles`, `query_start_table`, `query_tiles` are read

    def granule_form(self, dtype: torch.dtype) -> GranuleForm:
        """How adapters' weights of this type must lie in the arena."""

    @property
    def can_be_captured(self) -> bool:
        """Whether a step of decode rows is device work only, so that a CUDA graph can hold it."""

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """`residual += delta`, then `out = weight * residual / sqrt(mean(residual^2) + eps)`.

        Zhang & Sennrich 2019. residual fp32 [T, H], changed in place; weight and statistics fp32.
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
        [T], block * block_tokens + offset, or -1 for a row that is padding: it writes no k and v.
        """

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        """Causal grouped-query attention over the paged cache; out `[T, heads * head_dim]`.

        softmax(q k^T / sqrt(head_dim)) v. With a window, a query sees itself and the `window - 1`
        keys before it (Beltagy et al. 2020, as in Mistral).
        """

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """`out = silu(gate) * up` for gate_up `[T, 2 I]`; out `[T, I]`."""

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        """`out = x W^T` with W the dequantised NF4 weight, plus the rows' updates as in `lora_`."""

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

    def scale_output_(
        self, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
    ) -> None:
        """`y[t, p] *= c` for every row t whose adapter has output scales, every projection p.

        c fp32 [width] an adapter, layer and module: DoRA's m / |W + s B A| per output feature (Liu
        et al. 2024), which multiplies the base product and its update alike. Computed in fp32, y
        rounded once. y [T, N].
        """
