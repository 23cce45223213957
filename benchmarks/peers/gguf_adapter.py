"""A PEFT adapter of a Llama model in llama.cpp's GGUF form.

What its `convert_lora_to_gguf.py` writes, tensor for tensor: `NAME.lora_a` `[rank, in]` and
`NAME.lora_b` `[out, rank]` in float16 with alpha beside them, and the rows of q's and k's B in the
order in which llama.cpp holds those weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys
from loraplex.adapters.peft import CONFIG_NAME
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from safetensors.torch import load_file

_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf_adapter(peft: Path, model: Path, target: Path) -> None:
    """`model` is the Hugging Face folder of the base, for its numbers of heads."""
    heads = json.loads((model / "config.json").read_bytes())
    alpha = json.loads((peft / CONFIG_NAME).read_bytes())["lora_alpha"]
    writer = GGUFWriter(target, "llama")
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in load_file(peft / WEIGHTS_NAME).items():
        values = tensor.float().numpy()
        writer.add_tensor(gguf_name(name), _in_order(name, values, heads).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` -> `blk.0...`."""
    *_, layer, _, module, matrix, _ = name.split(".")
    return f"blk.{layer}.{_MODULES[module]}.weight.{matrix.lower()}"


def interleaved(values: Any, num_heads: int) -> Any:
    """Rows of a head from transformers' order (i, i + d / 2) to llama.cpp's (2i, 2i + 1).

    `[num_heads, 2, d / 2, ...]` becomes `[num_heads, d / 2, 2, ...]`.
    """
    shape = values.shape
    halves = values.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def _in_order(name: str, values: Any, heads: dict[str, int]) -> Any:
    if name.endswith("q_proj.lora_B.weight"):
        return interleaved(values, heads["num_attention_heads"])
    if name.endswith("k_proj.lora_B.weight"):
        return interleaved(values, heads["num_key_value_heads"])
    return values
