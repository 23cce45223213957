"""SmolLM2's GGUF as an ordinary Hugging Face folder: bf16 weights, tokenizer and chat template."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from loraplex.errors import ModelError

_CONTROL_TOKEN = 3  # GGUF's token_type of special tokens


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def write_folder(gguf: Path, folder: Path, report: Callable[[int, int], None]) -> None:
    """Fill `folder` with everything transformers loads; `report` hears bytes done and in all."""
    reader = GGUFReader(gguf)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama" or meta.get("tokenizer.ggml.pre") != "smollm":
        raise ModelError("the GGUF is not of SmolLM2's architecture and tokenizer")
    config = llama_config(meta, tied=all(t.name != "output.weight" for t in reader.tensors))
    write_json(folder / "config.json", config)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", generation)
    _write_tokenizer(meta, folder)
    tensors = {}
    total = sum(int(tensor.n_elements) for tensor in reader.tensors) * 2
    done = 0
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weight = to_hf(tensor.name, torch.from_numpy(values), config)
        tensors[hf_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
        done += weight.numel() * 2
        report(done, total)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def llama_config(meta: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM."""
    hidden = meta["llama.embedding_length"]
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": hidden**-0.5,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": _decimal(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(meta["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
    }


def _decimal(value: float) -> float:
    """The decimal number that was stored as a float32."""
    return float(f"{value:.7g}")


_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, module, "weight"] if module in _MODULES:
            return f"model.layers.{layer}.{_MODULES[module]}.weight"
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    raise ModelError(f"the GGUF holds a tensor that a Llama model has not: {name}")


def to_hf(name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Undo llama.cpp's permutation of the rows of q and k.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head, transformers rows (i, i + d / 2):
    `[num_heads, d / 2, 2, hidden]` becomes `[num_heads, 2, d / 2, hidden]`.
    """
    match name.split(".")[-2]:
        case "attn_q":
            heads = config["num_attention_heads"]
        case "attn_k":
            heads = config["num_key_value_heads"]
        case _:
            return weight
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns)


def build_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE over GPT-2's split, every digit on its own ("smollm" in llama.cpp)."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    left_right = (merge.split(" ") for merge in meta["tokenizer.ggml.merges"])
    tokenizer = Tokenizer(
        BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in left_right],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[index] for index in _special_ids(meta)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _special_ids(meta: Mapping[str, Any]) -> list[int]:
    return [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]


def _write_tokenizer(meta: Mapping[str, Any], folder: Path) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    named = {
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
    }
    added = {
        str(index): {
            "content": tokens[index],
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index in _special_ids(meta)
    }
    config = {
        # transformers' GPT2Tokenizer would rebuild the pre-tokenizer and lose the digits' split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        **named,
        "chat_template": meta["tokenizer.chat_template"],
    }
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", config)
