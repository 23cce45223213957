"""config.json: every key that bears on the result is read, and what is not computed is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from loraplex.errors import ModelError
from loraplex.model.config import (
    MODULES,
    LinearShape,
    Llama3Rope,
    ModelConfig,
    ModuleShape,
    Rope,
    read_json,
    read_model_config,
)

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(folder: Path, **keys: Any) -> ModelConfig:
    """None leaves a key out."""
    fields = {key: value for key, value in (LLAMA | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_model_config(folder)


def test_what_is_not_said_is_what_transformers_takes(tmp_path: Path) -> None:
    assert read(tmp_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        hidden_size=128,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=96,
        context_length=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        rope=Rope(10000.0),
    )


@pytest.mark.parametrize(
    ("key", "value", "field", "expected"),
    [
        ("num_key_value_heads", 2, "num_kv_heads", 2),
        ("head_dim", 48, "head_dim", 48),
        ("max_position_embeddings", 8192, "context_length", 8192),
        ("rms_norm_eps", 1e-5, "rms_norm_eps", 1e-5),
        ("tie_word_embeddings", True, "tie_word_embeddings", True),
        ("attention_bias", True, "attention_bias", True),
        ("mlp_bias", True, "mlp_bias", True),
    ],
)
def test_keys(tmp_path: Path, key: str, value: object, field: str, expected: object) -> None:
    assert getattr(read(tmp_path, **{key: value}), field) == expected


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, Rope(10000.0, linear_factor=4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
            Rope(5e5, linear_factor=4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            Rope(5e5, llama3=Llama3Rope(8.0, 1.0, 4.0, 8192)),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            Rope(5e5, llama3=Llama3Rope(8.0, 1.0, 4.0, 8192)),
        ),
    ],
)
def test_both_spellings_of_rope(tmp_path: Path, keys: dict[str, Any], rope: Rope) -> None:
    assert read(tmp_path, **keys).rope == rope


def test_linears_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=2, head_dim=64)
    linears = list(config.linears())
    assert len(linears) == 2 * len(MODULES)
    assert linears[1] == LinearShape("model.layers.0.self_attn.k_proj", 0, "k_proj", 128, 128)
    assert linears[3] == LinearShape("model.layers.0.self_attn.o_proj", 0, "o_proj", 128, 256)
    assert linears[13] == LinearShape("model.layers.1.mlp.down_proj", 1, "down_proj", 128, 192)
    *same, embedding, head = config.adaptable()
    assert same == [ModuleShape(*linear) for linear in linears]
    vocab = config.vocab_size
    assert embedding == ("model.embed_tokens", None, "embed_tokens", 128, vocab)
    assert head == ("lm_head", None, "lm_head", vocab, 128)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "(none)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "128"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 33}, "head_dim 33"),
        ({"hidden_size": 96}, "q_proj has 96 inputs"),
        ({"intermediate_size": 200}, "down_proj has 200 inputs"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_theta": [1]}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ],
)
def test_refused(tmp_path: Path, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, **keys)
    assert named in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\ud800"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(path)
