"""The Llama decoder over a flat batch: rows of many sequences, each with an adapter or none."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops
from torch import Tensor

from loraplex.model.config import ModelConfig
from loraplex.model.linear import Linear
from loraplex.model.rotary import rotary_tables


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Norm weights fp32 [hidden]; q,k,v and gate,up stacked into one linear each."""

    input_norm: Tensor
    qkv: Linear
    o: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """One forward pass; built by the batch. T rows in all."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T], where the row's KV goes: block * block_tokens + offset
    logits_rows: Tensor  # int64 [rows whose logits are wanted]
    attention: AttentionInput
    lora: LoraInput


class Decoder:
    """Weights and one forward pass. The residual stream is fp32, the activations `dtype`."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: list[DecoderLayer],
        norm: Tensor,
        head: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self._embedding = embedding  # [vocab, hidden]
        self._layers = layers
        self._norm = norm
        self._head = head  # [vocab, hidden]; the embedding itself when tied
        cos, sin = rotary_tables(config.rope, config.head_dim, config.context_length)
        self._cos, self._sin = cos.to(embedding.device), sin.to(embedding.device)

    def forward(self, batch: DecoderInput, kv_cache: Tensor, ops: Ops) -> Tensor:
        """Logits fp32 `[len(logits_rows), vocab]`; writes the rows' KV into the cache.

        kv_cache is the arena as `[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]`.
        """
        eps, dtype = self.config.rms_norm_eps, self.dtype
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        residual = F.embedding(batch.token_ids, self._embedding).float()
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            x = ops.add_rms_norm(residual, delta, layer.input_norm, eps, dtype)
            qkv = layer.qkv(x, ops, batch.lora, index)
            k_cache, v_cache = kv_cache[:, index, 0], kv_cache[:, index, 1]
            ops.rotary_and_cache(qkv, cos, sin, k_cache, v_cache, batch.slot_mapping)
            attended = ops.attention(qkv, k_cache, v_cache, batch.attention)
            delta = layer.o(attended, ops, batch.lora, index)
            x = ops.add_rms_norm(residual, delta, layer.post_attention_norm, eps, dtype)
            gate_up = layer.gate_up(x, ops, batch.lora, index)
            delta = layer.down(ops.silu_mul(gate_up), ops, batch.lora, index)
        assert delta is not None
        rows = batch.logits_rows
        x = ops.add_rms_norm(residual[rows], delta[rows], self._norm, eps, dtype)
        return F.linear(x, self._head).float()
