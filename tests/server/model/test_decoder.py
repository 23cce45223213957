"""The decoder computes what transformers computes with the same dequantised weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import read_model_config
from loraplex.model.decoder import Activations, Decoder, DecoderInput
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex_kernels.bitsandbytes import functional as bnb
from loraplex_kernels.dispatch import cpu_ops
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.ops import AttentionInput, LoraInput, Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.tables import AdapterTables
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")
VOCAB = 96
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"num_key_value_heads": 2, "head_dim": 64},
    "narrow heads": {"num_key_value_heads": 2, "head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "slow rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "another epsilon": {"rms_norm_eps": 0.5},
}


def save_model(folder: Path, max_shard_size: str = "1GB", **changes: Any) -> LlamaForCausalLM:
    """Random weights in float32: nothing is one or zero, no value is a bf16 number."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def reference_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """transformers in float32: linears through NF4, everything else rounded to bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.bfloat16()
            if "_proj.weight" in name:
                rounded = bnb.dequantize_4bit(
                    *bnb.quantize_4bit(rounded, blocksize=64, quant_type="nf4")
                )
            parameter.copy_(rounded.float())
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def load(folder: Path, form: WeightForm = WeightForm.DENSE) -> Decoder:
    options = LoadOptions(CPU, torch.float32, form)
    return load_decoder(Checkpoint(folder), read_model_config(folder), options)


class PagedDecoder:
    """A decoder and its cache, in which sequence i has every third block from the i-th on.

    Mutable: the cache, and `lengths`, the tokens of each sequence that lie in it.
    """

    NUM_SEQUENCES = 3
    NUM_BLOCKS = 12
    BLOCK_TOKENS = 16

    def __init__(self, decoder: Decoder, ops: Ops) -> None:
        config = decoder.config
        self._decoder = decoder
        self._ops = ops
        shape = (config.num_layers, 2, config.num_kv_heads, self.BLOCK_TOKENS, config.head_dim)
        self._cache = torch.full((self.NUM_BLOCKS, *shape), torch.nan)
        self._tables = AdapterTables(1, config.num_layers, 7, 16, CPU)
        self._memory = Activations.allocate(config, decoder.dtype, CPU, 64, 64)
        self.lengths = [0] * self.NUM_SEQUENCES

    def step(self, *rows: tuple[int, list[int]], logits_rows: list[int] | None = None) -> Tensor:
        """`(sequence, its next tokens)`, one token each first; logits of all rows if not said."""
        starts, positions, places, contexts = [0], [], [], []
        for sequence, tokens in rows:
            first = self.lengths[sequence]
            self.lengths[sequence] += len(tokens)
            starts.append(starts[-1] + len(tokens))
            contexts.append(self.lengths[sequence])
            blocks = self._blocks(sequence)
            for position in range(first, self.lengths[sequence]):
                block = blocks[position // self.BLOCK_TOKENS]
                positions.append(position)
                places.append(block * self.BLOCK_TOKENS + position % self.BLOCK_TOKENS)
        attention = AttentionInput(
            num_decode=sum(1 for _, tokens in rows if len(tokens) == 1),
            query_starts=starts,
            context_lens=contexts,
            context_table=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor([self._blocks(s) for s, _ in rows], dtype=torch.int32),
            query_start_table=None,
            query_tiles=None,
        )
        batch = DecoderInput(
            token_ids=torch.tensor([token for _, tokens in rows for token in tokens]),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(places),
            logits_rows=torch.tensor(
                range(starts[-1]) if logits_rows is None else logits_rows, dtype=torch.int64
            ),
            attention=attention,
            lora=LoraInput(
                arena=torch.zeros(0, dtype=torch.uint8),
                dtype=torch.float32,
                form=GranuleForm.ROWS,
                tables=self._tables,
                has_adapters=False,
                has_output_scales=False,
                segments=(),
                segment_table=torch.zeros(0, 3, dtype=torch.int32),
                tiles=None,
            ),
        )
        with torch.inference_mode():
            return self._decoder.forward(batch, self._cache, self._ops, self._memory).clone()

    def _blocks(self, sequence: int) -> list[int]:
        return list(range(self.NUM_BLOCKS - 1 - sequence, -1, -self.NUM_SEQUENCES))


@pytest.fixture(scope="module", params=["torch", "native"])
def ops(request: pytest.FixtureRequest, native_cache: Path) -> Ops:
    return TorchOps() if request.param == "torch" else cpu_ops(native_cache)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(VOCAB, (count,), generator=generator).tolist()
    return tokens


def relative_error(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_chunked_prefill_and_decode_are_transformers(
    changes: dict[str, Any], ops: Ops, tmp_path: Path
) -> None:
    save_model(tmp_path, **changes)
    tokens = random_tokens(60)
    paged = PagedDecoder(load(tmp_path), ops)
    chunks = [tokens[:21], tokens[21:22], tokens[22:47], tokens[47:54]]
    chunks += [[token] for token in tokens[54:]]
    logits = torch.cat([paged.step((0, chunk)) for chunk in chunks])
    reference = reference_logits(tmp_path, tokens)
    assert logits.dtype == torch.float32
    assert relative_error(logits, reference) < 1e-4
    assert float(reference.std()) > 0.1, "the comparison says nothing"


def test_sequences_in_one_step_do_not_see_each_other(ops: Ops, tmp_path: Path) -> None:
    save_model(tmp_path, num_key_value_heads=2)
    first, second, third = (random_tokens(count, count) for count in (40, 31, 20))
    paged = PagedDecoder(load(tmp_path), ops)
    paged.step((0, first[:38]), (1, second[:10]))
    mixed = paged.step((0, first[38:39]), (2, third[:1]), (1, second[10:31]))
    again = paged.step((0, first[39:]), (2, third[1:20]))
    references = [reference_logits(tmp_path, tokens) for tokens in (first, second, third)]
    expected = (references[0][38:39], references[2][:1], references[1][10:31])
    assert relative_error(mixed, torch.cat(expected)) < 1e-4
    assert relative_error(again, torch.cat((references[0][39:], references[2][1:20]))) < 1e-4


def test_only_the_rows_asked_for_get_logits(ops: Ops, tmp_path: Path) -> None:
    save_model(tmp_path)
    decoder, tokens = load(tmp_path), random_tokens(20)
    every = PagedDecoder(decoder, ops).step((0, tokens))
    some = PagedDecoder(decoder, ops).step((0, tokens), logits_rows=[3, 19])
    none = PagedDecoder(decoder, ops).step((0, tokens), logits_rows=[])
    assert relative_error(some, every[[3, 19]]) < 1e-5
    assert none.shape == (0, VOCAB)


@pytest.mark.parametrize("form", WeightForm)
def test_the_forms_of_the_weights_agree(form: WeightForm, tmp_path: Path) -> None:
    save_model(tmp_path, attention_bias=True)
    tokens = random_tokens(24)
    logits = PagedDecoder(load(tmp_path, form), TorchOps()).step((0, tokens))
    assert relative_error(logits, reference_logits(tmp_path, tokens)) < 1e-4


def test_shards_make_no_difference(tmp_path: Path) -> None:
    tokens = random_tokens(24)
    one = save_model(tmp_path / "one", mlp_bias=True)
    one.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(Checkpoint(tmp_path / "many").files) > 4
    logits = [
        PagedDecoder(load(tmp_path / name), TorchOps()).step((0, tokens))
        for name in ("one", "many")
    ]
    assert torch.equal(logits[0], logits[1])


def test_the_whole_context_has_positions(tmp_path: Path) -> None:
    save_model(tmp_path, max_position_embeddings=64)
    tokens = random_tokens(64)
    paged = PagedDecoder(load(tmp_path), TorchOps())
    logits = torch.cat([paged.step((0, tokens[:63])), paged.step((0, tokens[63:]))])
    assert relative_error(logits, reference_logits(tmp_path, tokens)) < 1e-4
