"""The Llama decoder over a flat batch: rows of many sequences, each with an adapter or none."""

from dataclasses import dataclass

import torch
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops
from loraplex_kernels.stack import LayerStack, Stack, StackStep, fuse
from loraplex_kernels.vocabulary import VocabularyInput, add_to_embedding_, add_to_logits_
from torch import Tensor

from loraplex.model.config import EMBEDDING, HEAD, MODULES, ModelConfig
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
    vocabulary: VocabularyInput | None = None  # None: no row's adapter reaches into it


@dataclass(frozen=True, slots=True)
class Activations:
    """Memory for everything one forward pass computes, made once: a step allocates nothing.

    R rows of a step, L of them with logits. Every tensor starts at the same address in each step,
    which is what a captured graph counts on.
    """

    embedded: Tensor  # [R, hidden]
    residual: Tensor  # fp32 [R, hidden]
    cos: Tensor  # fp32 [R, head_dim / 2]
    sin: Tensor
    normed: Tensor  # [R, hidden]
    qkv: Tensor  # [R, (heads + 2 kv_heads) * head_dim]
    attended: Tensor  # [R, heads * head_dim]
    delta: Tensor  # [R, hidden], what the last linear adds to the residual
    gate_up: Tensor  # [R, 2 intermediate]
    gated: Tensor  # [R, intermediate]
    last_residual: Tensor  # fp32 [L, hidden]
    last_delta: Tensor  # [L, hidden]
    last_normed: Tensor  # [L, hidden]
    scores: Tensor  # [L, vocab]
    logits: Tensor  # fp32 [L, vocab]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int,
        max_logits: int,
    ) -> "Activations":
        hidden, wide = config.hidden_size, config.intermediate_size
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim

        def rows(width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(max_rows, width, dtype=kind, device=device)

        def last(width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(max_logits, width, dtype=kind, device=device)

        return cls(
            embedded=rows(hidden),
            residual=rows(hidden, torch.float32),
            cos=rows(dim // 2, torch.float32),
            sin=rows(dim // 2, torch.float32),
            normed=rows(hidden),
            qkv=rows((heads + 2 * kv_heads) * dim),
            attended=rows(heads * dim),
            delta=rows(hidden),
            gate_up=rows(2 * wide),
            gated=rows(wide),
            last_residual=last(hidden, torch.float32),
            last_delta=last(hidden),
            last_normed=last(hidden),
            scores=last(config.vocab_size),
            logits=last(config.vocab_size, torch.float32),
        )

    def first(self, num_rows: int, num_logits: int) -> "Activations":
        """The same memory, cut to one step's rows."""
        assert num_rows <= len(self.residual)
        assert num_logits <= len(self.logits)
        sizes = dict.fromkeys(self.__slots__, num_rows)
        sizes |= dict.fromkeys(_OF_LAST_ROWS, num_logits)
        return Activations(**{name: getattr(self, name)[:size] for name, size in sizes.items()})

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__slots__)


_OF_LAST_ROWS = ("last_residual", "last_delta", "last_normed", "scores", "logits")


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
        self._fused: tuple[Ops, LayerStack | None] | None = None  # for the ops that asked last

    def forward(
        self, batch: DecoderInput, kv_cache: Tensor, ops: Ops, memory: Activations
    ) -> Tensor:
        """Logits fp32 `[len(logits_rows), vocab]` in `memory`; writes the rows' KV into the cache.

        kv_cache is the arena as `[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]`.
        """
        work = memory.first(len(batch.token_ids), len(batch.logits_rows))
        self._embed(batch, work)
        fused = self.fused(ops)
        if fused is not None:
            fused.run(_stack_step(batch, kv_cache, work))
        else:
            self._layer_by_layer(batch, kv_cache, ops, work)
        if batch.vocabulary is not None:
            add_to_logits_(work.logits, work.last_normed, batch.vocabulary)
        return work.logits

    def chooses(self, batch: DecoderInput, ops: Ops) -> bool:
        """Whether `choose` does this pass, quicker than `forward`."""
        return batch.vocabulary is None and self.fused(ops) is not None

    def choose(
        self, batch: DecoderInput, kv_cache: Tensor, ops: Ops, memory: Activations
    ) -> Tensor:
        """Of each row that `forward` has logits for, the token of the largest: int64 `[rows]`.

        The first of equal ones; -1 where a logit is not finite.
        """
        work = memory.first(len(batch.token_ids), len(batch.logits_rows))
        self._embed(batch, work)
        fused = self.fused(ops)
        assert fused is not None
        tokens = torch.empty(len(work.logits), dtype=torch.int64, device=work.logits.device)
        fused.run(_stack_step(batch, kv_cache, work, tokens))
        return tokens

    def fused(self, ops: Ops) -> LayerStack | None:
        """All layers as one op of these ops, where they have it."""
        if self._fused is None or self._fused[0] is not ops:
            self._fused = ops, fuse(self._stack(), ops)
        return self._fused[1]

    def _stack(self) -> Stack:
        config = self.config
        return Stack(
            layers=self._layers,
            norm=self._norm,
            head=self._head,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
        )

    def _layer_by_layer(
        self, batch: DecoderInput, kv_cache: Tensor, ops: Ops, work: Activations
    ) -> None:
        eps, lora, rows = self.config.rms_norm_eps, batch.lora, batch.logits_rows
        residual = work.residual
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            ops.add_rms_norm(residual, delta, layer.input_norm, eps, work.normed)
            layer.qkv(work.normed, ops, lora, index, work.qkv)
            k_cache, v_cache = kv_cache[:, index, 0], kv_cache[:, index, 1]
            ops.rotary_and_cache(work.qkv, work.cos, work.sin, k_cache, v_cache, batch.slot_mapping)
            ops.attention(work.qkv, k_cache, v_cache, batch.attention, work.attended)
            delta = layer.o(work.attended, ops, lora, index, work.delta)
            ops.add_rms_norm(residual, delta, layer.post_attention_norm, eps, work.normed)
            layer.gate_up(work.normed, ops, lora, index, work.gate_up)
            ops.silu_mul(work.gate_up, work.gated)
            delta = layer.down(work.gated, ops, lora, index, work.delta)
        torch.index_select(residual, 0, rows, out=work.last_residual)
        torch.index_select(work.delta, 0, rows, out=work.last_delta)
        ops.add_rms_norm(work.last_residual, work.last_delta, self._norm, eps, work.last_normed)
        torch.mm(work.last_normed, self._head.T, out=work.scores)
        work.logits.copy_(work.scores)

    def _embed(self, batch: DecoderInput, work: Activations) -> None:
        """The residual stream's start, and the rows' cosines and sines beside it."""
        torch.index_select(self._embedding, 0, batch.token_ids, out=work.embedded)
        torch.index_select(self._cos, 0, batch.positions, out=work.cos)
        torch.index_select(self._sin, 0, batch.positions, out=work.sin)
        work.residual.copy_(work.embedded)
        if batch.vocabulary is not None:
            add_to_embedding_(work.residual, batch.token_ids, batch.vocabulary)

    def base_weight(self, name: str) -> Tensor:
        """The served values of one module of the base, `[out, in]`, by its checkpoint name."""
        if name in (EMBEDDING, HEAD):
            return self._embedding if name == EMBEDDING else self._head
        shape = next(shape for shape in self.config.linears() if shape.name == name)
        layer, module = self._layers[shape.layer], MODULES.index(shape.module)
        return next(
            weight
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
            for weight in linear.weights_of(module)
        )


def _stack_step(
    batch: DecoderInput, kv_cache: Tensor, work: Activations, tokens: Tensor | None = None
) -> StackStep:
    return StackStep(
        residual=work.residual,
        cos=work.cos,
        sin=work.sin,
        kv_cache=kv_cache,
        slot_mapping=batch.slot_mapping,
        attention=batch.attention,
        lora=batch.lora,
        logits_rows=batch.logits_rows,
        normed=work.normed,
        qkv=work.qkv,
        attended=work.attended,
        last_normed=work.last_normed,
        logits=work.logits,
        tokens=tokens,
    )
