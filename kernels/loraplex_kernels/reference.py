"""Every op in plain torch: what the fast forms are held to, and the fallback for all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.ops import (
    AttentionInput,
    LoraInput,
    Projection,
)
from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import GRANULE_RANK, view


class TorchOps:
    """The ops of `loraplex_kernels.ops.Ops` on any device torch knows."""

    name = "torch"

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        if delta is not None:
            residual += delta
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (x * weight.float()).to(dtype)

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
        heads = qkv.view(qkv.shape[0], -1, head_dim)  # [num_tokens, heads + 2 * kv_heads, head_dim]
        rotated = heads[:, :-num_kv_heads].float()
        low, high = rotated.chunk(2, dim=-1)
        c, s = cos[:, None, :], sin[:, None, :]
        turned = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
        heads[:, :-num_kv_heads] = turned.to(qkv.dtype)
        block, offset = slot_mapping // block_tokens, slot_mapping % block_tokens
        k_cache[block, :, offset] = heads[:, -2 * num_kv_heads : -num_kv_heads]
        v_cache[block, :, offset] = heads[:, -num_kv_heads:]

    def attention(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, where: AttentionInput
    ) -> Tensor:
        num_kv_heads, _, head_dim = k_cache.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q = heads[:, : -2 * num_kv_heads]
        out = torch.empty(q.shape, dtype=qkv.dtype, device=qkv.device)
        for i in range(len(where.context_lens)):
            lo, hi = where.query_starts[i], where.query_starts[i + 1]
            self.attend_one(q, k_cache, v_cache, where, i, out[lo:hi])
        return out.view(qkv.shape[0], -1)

    def attend_one(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        index: int,
        out: Tensor,
    ) -> None:
        """Attention of sequence `index` alone, into `out [num_queries, heads, head_dim]`."""
        context = where.context_lens[index]
        lo, hi = where.query_starts[index], where.query_starts[index + 1]
        groups = q.shape[1] // k_cache.shape[1]
        blocks = where.block_tables[index, : -(-context // k_cache.shape[2])].long()
        k = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]  # [kv_heads, context, dim]
        v = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
        num_queries = hi - lo
        mask = None
        if 1 < num_queries < context:
            first = context - num_queries
            mask = torch.ones(num_queries, context, dtype=torch.bool, device=q.device).tril(first)
        out.copy_(
            F.scaled_dot_product_attention(
                q[lo:hi].transpose(0, 1)[None],
                k.repeat_interleave(groups, 0)[None],
                v.repeat_interleave(groups, 0)[None],
                attn_mask=mask,
                is_causal=num_queries == context and num_queries > 1,
            )[0].transpose(0, 1)
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        for segment in lora.segments:
            self.lora_segment_(y, x, lora, layer, projections, segment)

    def lora_segment_(
        self,
        y: Tensor,
        x: Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        segment: Segment,
    ) -> None:
        """The update of one segment's rows; `v = x A^T` and its scale in fp32."""
        rows = x[segment.lo : segment.hi]
        for projection in projections:
            update: Tensor | None = None
            for a, b, scale in lora.tables.granules(segment.slot, layer, projection.module):
                a_weight = view(lora.arena, a, GRANULE_RANK, x.shape[1], lora.dtype)
                b_weight = view(lora.arena, b, GRANULE_RANK, projection.width, lora.dtype)
                v = (rows.to(lora.dtype) @ a_weight.T).float() * scale
                product = v.to(lora.dtype) @ b_weight
                update = product if update is None else update.float() + product
            if update is not None:
                target = y[segment.lo : segment.hi].narrow(1, projection.column, projection.width)
                target += update
