"""Adapters that PEFT itself made: the same modules, ranks, scales and bytes as PEFT loads."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config
from loraplex.errors import AdapterInvalidError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

# Between PEFT and transformers, on every wrapped model.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
MAX_RANK = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).eval()


def linears_of(model: Any) -> dict[str, BaseLinear]:
    return {
        name: BaseLinear(
            name=name,
            layer=int(name.split(".")[2]) if "layers" in name else None,
            module=name.rpartition(".")[2],
            out_features=getattr(module, "out_features", module.weight.shape[1]),
            in_features=getattr(module, "in_features", module.weight.shape[0]),
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }


def save(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    model.save_pretrained(str(folder))


def read(folder: Path) -> AdapterSpec:
    config = read_config((folder / "adapter_config.json").read_text(), MAX_RANK)
    weights = folder / "adapter_model.safetensors"
    return read_adapter(weights, config, linears_of(tiny_llama()), MAX_RANK)


def reference(folder: Path) -> dict[str, Any]:
    """The layers as PEFT loads them, by the base model's names."""
    model = PeftModel.from_pretrained(tiny_llama(), str(folder))
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def matrix_of(data: bytes, matrix: Any) -> torch.Tensor:
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[matrix.dtype]
    raw = bytearray(data[matrix.start : matrix.end])
    return torch.frombuffer(raw, dtype=dtype).reshape(matrix.shape).float()


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "odd scale": {"r": 3, "lora_alpha": 7, "target_modules": [*ATTENTION, *MLP]},
    "rslora": {"r": 8, "lora_alpha": 5, "use_rslora": True, "target_modules": MLP},
    "rank pattern": {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 16, "q_proj": 5},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"mlp.up_proj": 7, "model.layers.0.self_attn.q_proj": 1},
        "alpha_pattern": {"up_proj": 11, "layers.2.self_attn.v_proj": 0.5},
    },
    "first match wins": {
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"a": 9, "layers.0.self_attn.q_proj": 2, "self_attn.q_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1, "q_proj": 2},
    },
    "a dot is any character": {
        "r": 4,
        "target_modules": ["q_proj"],
        "rank_pattern": {"self.attn.q.proj": 2},
    },
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1},
    "some layers": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "a regular expression": {"r": 4, "target_modules": r".*\.[02]\..*(q|up)_proj"},
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "full names": {"r": 4, "target_modules": ["model.layers.1.mlp.up_proj"]},
    "excluded": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"],
    },
    "by default": {},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": ["q_proj"]},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj"]},
    "tied": {"ensure_weight_tying": True, "target_modules": ["q_proj"]},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "up_proj"], "r": 4},
    "activated": {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj", "lm_head"]},
    "embeddings and head": {
        "r": 4,
        "target_modules": ["embed_tokens", "lm_head", "v_proj"],
        "rank_pattern": {"lm_head": 9},
        "alpha_pattern": {"embed_tokens": 3},
    },
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_modules_ranks_scales_and_bytes_are_pefts(tmp_path: Path, case: str) -> None:
    save(tmp_path, **CASES[case])
    spec, layers = read(tmp_path), reference(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert {module.base.name for module in spec.modules} == layers.keys()
    for module in spec.modules:
        layer = layers[module.base.name]
        assert module.rank == layer.r["default"]
        assert module.scale == layer.scaling["default"]
        a, b = (weight_of(layer, side) for side in "AB")
        assert torch.equal(matrix_of(data, module.a), a)
        assert torch.equal(matrix_of(data, module.b), b)
        if module.magnitude is not None:
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert torch.equal(matrix_of(data, module.magnitude), magnitude)
    assert spec.rank == max(layer.r["default"] for layer in layers.values())
    assert bool(spec.warnings) == (case in {"first match wins", "excluded"})
    assert spec.use_dora == any(layer.use_dora["default"] for layer in layers.values())
    assert list(spec.invocation_tokens) == CASES[case].get("alora_invocation_tokens", [])


def weight_of(layer: Any, side: str) -> torch.Tensor:
    if layer.lora_embedding_A:
        matrix: torch.Tensor = getattr(layer, f"lora_embedding_{side}")["default"]
    else:
        matrix = getattr(layer, f"lora_{side}")["default"].weight
    return matrix.float()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning")
def test_peft_loads_a_transposed_adapter_as_any_other(tmp_path: Path) -> None:
    save(tmp_path, target_modules=["q_proj"])
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('n_out": false', 'n_out": true'))
    [warning] = read(tmp_path).warnings
    assert warning.startswith("fan_in_fan_out: ")
    assert not any(layer.fan_in_fan_out for layer in reference(tmp_path).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_lies(tmp_path: Path, dtype: torch.dtype) -> None:
    save(tmp_path, dtype, r=4, target_modules=["q_proj"])
    spec, layers = read(tmp_path), reference(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    for module in spec.modules:
        weight = layers[module.base.name].lora_B["default"].weight
        assert torch.equal(matrix_of(data, module.b), weight.float())


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        ("bias", {"bias": "lora_only"}),
        ("lora_bias", {"lora_bias": True}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices", {"trainable_token_indices": [1]}),
        ("layer_replication", {"layer_replication": [[0, 2], [1, 3]]}),
        ("kasa_config", {"kasa_config": {}}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", {"init_lora_weights": "olora"}),
    ],
)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_what_is_more_than_lora_is_refused_by_its_key(
    tmp_path: Path, key: str, fields: dict[str, Any]
) -> None:
    save(tmp_path, target_modules=["q_proj"], **fields)
    with pytest.raises(AdapterInvalidError) as caught:
        read(tmp_path)
    assert caught.value.field == key


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_dora_along_the_vocabulary_is_refused_by_tensor(tmp_path: Path, module: str) -> None:
    save(tmp_path, target_modules=["q_proj", module], use_dora=True)
    with pytest.raises(AdapterInvalidError, match="DoRA is not served") as caught:
        read(tmp_path)
    assert module in (caught.value.field or "")


def test_peft_refuses_what_we_refuse(tmp_path: Path) -> None:
    """No server could say what an activated LoRA on embeddings is, or one with DoRA on a linear."""
    for fields in ({"target_modules": ["embed_tokens"]}, {"use_dora": True}):
        with pytest.raises(ValueError, match="unsupported variant combination"):
            save(tmp_path, alora_invocation_tokens=[1], **{"target_modules": ["q_proj"]} | fields)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_the_refused_inits_change_the_base_whenever_peft_loads_them(
    tmp_path: Path, init: str
) -> None:
    """Why they are refused: the same file on the same base would mean something else in PEFT."""
    save(tmp_path, init_lora_weights=init, target_modules=["q_proj"])
    base = tiny_llama().get_submodule("model.layers.0.self_attn.q_proj").weight
    loaded = reference(tmp_path)["model.layers.0.self_attn.q_proj"].get_base_layer().weight
    assert not torch.allclose(base, loaded, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"])
@pytest.mark.filterwarnings("ignore:.*Using default EVA config:UserWarning")
def test_the_accepted_inits_leave_the_base_alone(tmp_path: Path, init: Any) -> None:
    save(tmp_path, target_modules=["q_proj"])
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    assert '"init_lora_weights": true' in text
    value = str(init).lower() if isinstance(init, bool) else f'"{init}"'
    config.write_text(text.replace('_weights": true', f'_weights": {value}'))
    read(tmp_path)
    base = tiny_llama().get_submodule("model.layers.0.self_attn.q_proj").weight
    loaded = reference(tmp_path)["model.layers.0.self_attn.q_proj"].get_base_layer().weight
    assert torch.equal(base, loaded)


def test_an_adapter_for_a_wider_base_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path, target_modules=["q_proj"])
    shutil.copy(tmp_path / "adapter_config.json", tmp_path / "kept.json")
    config = read_config((tmp_path / "kept.json").read_text(), MAX_RANK)
    wider = {
        name: BaseLinear(name, linear.layer, linear.module, 64, 64)
        for name, linear in linears_of(tiny_llama()).items()
    }
    with pytest.raises(AdapterInvalidError, match=r"q_proj\.lora_A\.weight: has the shape"):
        read_adapter(tmp_path / "adapter_model.safetensors", config, wider, MAX_RANK)
