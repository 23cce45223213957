"""A PEFT adapter in llama.cpp's form, read back with the gguf package."""

import json
from pathlib import Path

import numpy as np
from adapter_files import write_adapter
from gguf import GGUFReader
from loraplex.model.config import LinearShape
from peers.gguf_adapter import gguf_name, interleaved, write_gguf_adapter
from safetensors.torch import load_file

PREFIX = "model.layers.3.self_attn"


def test_names() -> None:
    name = "base_model.model.model.layers.12.mlp.gate_proj.lora_B.weight"

    assert gguf_name(name) == "blk.12.ffn_gate.weight.lora_b"


def test_the_halves_of_a_head_become_neighbours() -> None:
    rows = np.arange(8).reshape(8, 1)  # two heads of four

    assert interleaved(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_every_matrix_is_there_with_q_in_llama_cpps_order(tmp_path: Path) -> None:
    linears = [
        LinearShape(f"{PREFIX}.q_proj", 3, "q_proj", in_features=12, out_features=8),
        LinearShape(f"{PREFIX}.o_proj", 3, "o_proj", in_features=8, out_features=12),
    ]
    write_adapter(tmp_path / "peft", linears, rank=4, seed=1)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))

    write_gguf_adapter(tmp_path / "peft", tmp_path, tmp_path / "a.gguf")

    reader = GGUFReader(tmp_path / "a.gguf")
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    peft = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    b = peft[f"base_model.model.{PREFIX}.q_proj.lora_B.weight"].half().numpy()
    a = peft[f"base_model.model.{PREFIX}.q_proj.lora_A.weight"].half().numpy()
    assert len(written) == 4
    assert np.array_equal(written["blk.3.attn_q.weight.lora_a"], a)
    assert np.array_equal(written["blk.3.attn_q.weight.lora_b"], interleaved(b, 2))
    assert reader.fields["adapter.lora.alpha"].contents() == 4.0
    assert reader.fields["general.type"].contents() == "adapter"
