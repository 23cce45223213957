"""Every op in plain torch: what the fast forms are held to, and the fallback for all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import view


class TorchOps:
    """The ops of `loraplex_kernels.ops.Ops` on any device torch knows."""

    name = "torch"
    uses_tiles = False
    can_be_captured = False

    def granule_form(self, dtype: torch.dtype) -> GranuleForm:
        return GranuleForm.ROWS

    def add_rms_norm(
        self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        if delta is not None:
            residual += delta
        x = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
        out.copy_(x * weight)

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
        is_real = slot_mapping >= 0
        where, heads = slot_mapping[is_real], heads[is_real]
        block, offset = where // block_tokens, where % block_tokens
        k_cache[block, :, offset] = heads[:, -2 * num_kv_heads : -num_kv_heads]
        v_cache[block, :, offset] = heads[:, -num_kv_heads:]

    def attention(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        out: Tensor,
        window: int | None = None,
    ) -> None:
        self.attend(qkv, k_cache, v_cache, where, range(len(where.context_lens)), out, window)

    def attend(
        self,
        qkv: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        where: AttentionInput,
        sequences: range,
        out: Tensor,
        window: int | None,
    ) -> None:
        """Attention of some of the sequences, one after another."""
        num_kv_heads, _, head_dim = k_cache.shape[1:]
        q = qkv.view(qkv.shape[0], -1, head_dim)[:, : -2 * num_kv_heads]
        heads = out.view(q.shape)
        for index in sequences:
            lo, hi = where.query_starts[index], where.query_starts[index + 1]
            context = where.context_lens[index]
            if context == 0:
                heads[lo:hi].zero_()
                continue
            blocks = where.block_tables[index, : -(-context // k_cache.shape[2])].long()
            k = k_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
            v = v_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :context]
            heads[lo:hi] = _attend(q[lo:hi], k, v, window)

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        out.copy_(F.silu(gate.float()) * up.float())

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        self.base_linear(x, weight, out)
        if lora.has_adapters:
            self.lora_(out, x, lora, layer, projections)

    def base_linear(self, x: Tensor, weight: BaseWeight, out: Tensor) -> None:
        """`out = x W^T`: dense where there is a copy, else through bitsandbytes."""
        if weight.dense is not None:
            torch.mm(x, weight.dense.T, out=out)
        elif x.dtype == torch.bfloat16:
            from loraplex_kernels.bitsandbytes import matmul_4bit

            out.copy_(matmul_4bit(x, weight.nf4.codes.view(-1, 1), weight.nf4.state))
        else:  # bitsandbytes would not round the weight to bf16
            torch.mm(x, weight.nf4.dequantize().to(x.dtype).T, out=out)

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
                a_weight = lora.form.read_a(lora.arena, a, x.shape[1], lora.dtype)
                b_weight = lora.form.read_b(lora.arena, b, projection.width, lora.dtype)
                v = (rows.to(lora.dtype) @ a_weight.T).float() * scale
                product = v.to(lora.dtype) @ b_weight
                update = product if update is None else update.float() + product
            if update is not None:
                target = y[segment.lo : segment.hi].narrow(1, projection.column, projection.width)
                target += update

    def scale_output_(
        self, y: Tensor, lora: LoraInput, layer: int, projections: tuple[Projection, ...]
    ) -> None:
        for slot, lo, hi in lora.segments:
            if slot not in lora.tables.scaled_slots:
                continue
            offsets = lora.tables.output_scale[slot, layer].tolist()
            for module, column, width in projections:
                if offsets[module] >= 0:
                    factor = view(lora.arena, offsets[module], 1, width, torch.float32)
                    target = y[lo:hi].narrow(1, column, width)
                    target *= factor  # torch multiplies in the wider type, and rounds once


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: q [queries, heads, dim] are its last ones, k, v [kv_heads, context, dim]."""
    num_queries, context = q.shape[0], k.shape[1]
    groups = q.shape[1] // k.shape[0]
    is_whole = num_queries == context and window is None
    mask = None
    if window is not None or 1 < num_queries < context:
        first = context - num_queries
        mask = torch.ones(num_queries, context, dtype=torch.bool, device=q.device).tril(first)
        if window is not None:
            mask = mask.triu(first - window + 1)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.repeat_interleave(groups, 0)[None],
        v.repeat_interleave(groups, 0)[None],
        attn_mask=mask,
        is_causal=is_whole and num_queries > 1,
    )
    return attended[0].transpose(0, 1)
