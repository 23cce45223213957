"""Loading: full precision is quantised, bitsandbytes' checkpoints keep their codes, errors name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.errors import ModelError
from loraplex.model import nf4
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import MODULES, read_model_config
from loraplex.model.decoder import Decoder, DecoderLayer
from loraplex.model.linear import Linear, WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex_kernels.bitsandbytes import functional as bnb
from loraplex_kernels.ops import Projection
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
WEIGHTS = "model.safetensors"
LINEAR = "model.layers.1.self_attn.k_proj.weight"


def save_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY | changes)).to(dtype).save_pretrained(folder)
    return folder


def save_quantised(folder: Path, **settings: Any) -> Path:
    """The model above as transformers quantises and saves it."""
    full = save_model(folder / "full")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "nf4")
    return folder / "nf4"


def load(
    folder: Path, dtype: torch.dtype = torch.bfloat16, form: WeightForm = WeightForm.PACKED
) -> Decoder:
    options = LoadOptions(CPU, dtype, form)
    return load_decoder(Checkpoint(folder), read_model_config(folder), options)


def layers_of(decoder: Decoder) -> list[DecoderLayer]:
    return decoder._layers


def parts(linear: Linear, modules: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each stacked module's codes and absmax."""
    found = {}
    weight = linear.weight.nf4
    for module, projection in zip(modules, linear.projections, strict=True):
        end = projection.column + projection.width
        blocks = slice(*(row * weight.in_features // 64 for row in (projection.column, end)))
        assert MODULES[projection.module] == module
        found[module] = (weight.codes[projection.column : end], weight.absmax[blocks])
    return found


def modules_of(layer: DecoderLayer) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        **parts(layer.qkv, ("q_proj", "k_proj", "v_proj")),
        **parts(layer.o, ("o_proj",)),
        **parts(layer.gate_up, ("gate_proj", "up_proj")),
        **parts(layer.down, ("down_proj",)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_full_precision_is_quantised_as_bitsandbytes_does(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = save_model(tmp_path, dtype)
    tensors = load_file(folder / WEIGHTS)
    decoder = load(folder)
    config = decoder.config
    for linear in config.linears():
        codes, absmax = modules_of(layers_of(decoder)[linear.layer])[linear.module]
        expected = nf4.quantize(tensors[f"{linear.name}.weight"])
        assert torch.equal(codes, expected.codes)
        assert torch.equal(absmax, expected.absmax)


@pytest.mark.parametrize("form", WeightForm)
@pytest.mark.parametrize("tied", [False, True])
def test_the_served_values_of_every_module_are_told_by_name(
    tmp_path: Path, form: WeightForm, tied: bool
) -> None:
    folder = save_model(tmp_path, num_key_value_heads=2, tie_word_embeddings=tied)
    tensors = load_file(folder / WEIGHTS)
    decoder = load(folder, form=form)
    for module in decoder.config.adaptable():
        name = "model.embed_tokens" if module.name == "lm_head" and tied else module.name
        expected = tensors[f"{name}.weight"].bfloat16()
        if module.layer is not None:
            expected = nf4.quantize(expected).dequantize()
        assert torch.equal(decoder.base_weight(module.name).bfloat16(), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_quantised_checkpoint_keeps_its_codes(tmp_path: Path, nested: bool, storage: str) -> None:
    folder = save_quantised(
        tmp_path, bnb_4bit_use_double_quant=nested, bnb_4bit_quant_storage=storage
    )
    tensors = load_file(folder / WEIGHTS)
    assert (f"{LINEAR}.nested_absmax" in tensors) == nested
    decoder = load(folder)
    for linear in decoder.config.linears():
        codes, absmax = modules_of(layers_of(decoder)[linear.layer])[linear.module]
        prefix = f"{linear.name}.weight"
        saved = tensors[prefix].view(-1).view(torch.uint8)
        assert torch.equal(codes.reshape(-1), saved)
        assert torch.equal(absmax, absmax_of(tensors, prefix))


def absmax_of(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """In float32, by bitsandbytes' own reading of its format."""
    state = bnb.QuantState.from_dict(
        {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{prefix}.")
        },
        device=CPU,
    )
    if not state.nested:
        return torch.as_tensor(state.absmax)
    return torch.as_tensor(bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def test_quantised_beforehand_or_while_loading_is_the_same(tmp_path: Path) -> None:
    quantised = save_quantised(tmp_path, bnb_4bit_use_double_quant=False)
    decoders = [load(folder) for folder in (quantised, tmp_path / "full")]
    for before, now in zip(*map(layers_of, decoders), strict=True):
        for module, (codes, absmax) in modules_of(before).items():
            assert torch.equal(codes, modules_of(now)[module][0])
            assert torch.equal(absmax, modules_of(now)[module][1])


def test_projections_lie_side_by_side_in_the_order_of_the_tables(tmp_path: Path) -> None:
    layer = layers_of(load(save_model(tmp_path, head_dim=64)))[0]
    assert layer.qkv.projections == (
        Projection(0, 0, 256),
        Projection(1, 256, 128),
        Projection(2, 384, 128),
    )
    assert layer.o.projections == (Projection(3, 0, 128),)
    assert layer.gate_up.projections == (Projection(4, 0, 192), Projection(5, 192, 192))
    assert layer.down.projections == (Projection(6, 0, 128),)


def test_progress_counts_layers(tmp_path: Path) -> None:
    folder, seen = save_model(tmp_path, num_hidden_layers=3), []
    options = LoadOptions(CPU, torch.bfloat16, WeightForm.PACKED)
    load_decoder(
        Checkpoint(folder),
        read_model_config(folder),
        options,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


Tensors = dict[str, Tensor]


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def change(name: str, to: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, to(tensors[name]).clone())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop(LINEAR), f"lacks the tensor {LINEAR}"),
        (drop("model.norm.weight"), "lacks the tensor model.norm.weight"),
        (drop("lm_head.weight"), "lacks the tensor lm_head.weight"),
        (drop("model.layers.0.self_attn.q_proj.bias"), "model.layers.0.self_attn.q_proj.bias"),
        (change(LINEAR, lambda t: t.char()), f"{LINEAR} has dtype int8"),
        (change(LINEAR, lambda t: t.to(torch.float8_e4m3fn)), f"{LINEAR} has dtype float8_e4m3fn"),
        (change(LINEAR, lambda t: t[:, :64]), f"{LINEAR} has shape [64, 64]"),
        (change(LINEAR, lambda t: t.reshape(-1)), f"{LINEAR} has shape [8192]"),
        (
            change("model.embed_tokens.weight", lambda t: t[1:]),
            "model.embed_tokens.weight has shape [95, 128], but config.json makes it [96, 128]",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, edit: Callable[[Tensors], None], named: str
) -> None:
    assert_refused(save_model(tmp_path), edit, named)


def assert_refused(folder: Path, edit: Callable[[Tensors], None], named: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        load(folder)
    assert "\n" not in caught.value.message


STATE = f"{LINEAR}.{nf4.QUANT_STATE_KEY}"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop(f"{LINEAR}.absmax"), LINEAR),
        (drop(f"{LINEAR}.quant_map"), LINEAR),
        (drop(LINEAR), LINEAR),
        (drop(STATE), f"{LINEAR} is not quantised, though the checkpoint is"),
        (change(f"{LINEAR}.absmax", lambda t: t[1:]), f"{LINEAR} is not a readable NF4 weight"),
        (change(LINEAR, lambda t: t[1:]), f"{LINEAR} is not a readable NF4 weight"),
        (change(STATE, lambda t: t[:-5]), f"{LINEAR} is not a readable NF4 weight"),
        (change(STATE, lambda t: t[:0]), f"{LINEAR} is not a readable NF4 weight"),
    ],
)
def test_a_damaged_nf4_weight_is_named(
    tmp_path: Path, edit: Callable[[Tensors], None], named: str
) -> None:
    folder = save_quantised(tmp_path, bnb_4bit_use_double_quant=False)
    assert_refused(folder, edit, named)


def test_an_nf4_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    def transpose(tensors: Tensors) -> None:
        codes, state = bnb.quantize_4bit(torch.ones(128, 64), blocksize=64, quant_type="nf4")
        saved = {"": codes, **{f".{k}": v for k, v in state.as_dict(packed=True).items()}}
        tensors.update({f"{LINEAR}{part}": tensor for part, tensor in saved.items()})

    folder = save_quantised(tmp_path, bnb_4bit_use_double_quant=False)
    assert_refused(folder, transpose, LINEAR)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {},
    ],
)
def test_other_quantisations_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=r"config\.json: quantisation"):
        load(folder)


def test_weights_are_held_in_the_types_promised(tmp_path: Path) -> None:
    folder = save_model(tmp_path, torch.float32, tie_word_embeddings=True)
    embedding = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load(folder, dtype)
        assert decoder.dtype == dtype
        assert decoder._embedding is decoder._head, "a tied head is the embedding itself"
        assert torch.equal(decoder._embedding, embedding.bfloat16().to(dtype))
        assert all(layer.input_norm.dtype == torch.float32 for layer in layers_of(decoder))
