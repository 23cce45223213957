"""A random Llama of two layers as a checkpoint: it starts and steps quickly."""

import json
from pathlib import Path

import numpy as np
from loraplex.model.config import read_model_config
from safetensors.numpy import save_file


def write_model(folder: Path, vocab_size: int) -> None:
    """Into a folder that is there; the tokenizer is the caller's."""
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab_size, 64)) / 20}
    for linear in read_model_config(folder).linears():
        shape = (linear.out_features, linear.in_features)
        tensors[f"{linear.name}.weight"] = rng.standard_normal(shape) / 8
    norms = [f"model.layers.{n}.{w}_layernorm" for n in (0, 1) for w in ("input", "post_attention")]
    for norm in (*norms, "model.norm"):
        tensors[f"{norm}.weight"] = np.ones(64)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
