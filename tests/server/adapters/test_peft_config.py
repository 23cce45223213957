"""adapter_config.json: every key of the installed PEFT is computed, inert or refused by name."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.adapters.peft import version_of
from loraplex.adapters.peft_config import (
    COMPUTED_KEYS,
    INERT_KEYS,
    MAX_INVOCATION_TOKENS,
    REFUSED_KEYS,
    AdapterConfig,
    matches,
    read_config,
)
from loraplex.errors import AdapterInvalidError
from peft import LoraConfig
from peft.utils.other import get_pattern_key

MAX_RANK = 64
MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}

# Something other than the default for every key of LoraConfig, as it stands in the saved JSON.
SET: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "alpha_pattern": {"q_proj": 4},
    "arrow_config": {"top_k": 2},
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "base_model_name_or_path": "someone/something",
    "bias": "lora_only",
    "corda_config": {"corda_method": "kpm"},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 1.0},
    "exclude_modules": ["k_proj"],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "kasa_config": {"beta": 1e-3},
    "layer_replication": [[0, 1], [0, 1]],
    "layers_pattern": "layers",
    "layers_to_transform": [0],
    "loftq_config": {"loftq_bits": 4},
    "lora_alpha": 3,
    "lora_bias": True,
    "lora_dropout": 0.5,
    "lora_ga_config": {"direction": "random"},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "megatron_core": "elsewhere",
    "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 4},
    "peft_type": "ADALORA",
    "peft_version": "0.1.0",
    "qalora_group_size": 32,
    "r": 3,
    "rank_pattern": {"q_proj": 4},
    "revision": "main",
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.down_proj"],
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
    "use_rslora": True,
    "velora_config": {"num_groups": 4},
}


def read(**fields: Any) -> AdapterConfig:
    return read_config(json.dumps(MINIMAL | fields), MAX_RANK)


def refusal(config_json: str) -> AdapterInvalidError:
    with pytest.raises(AdapterInvalidError) as caught:
        read_config(config_json, MAX_RANK)
    return caught.value


def test_the_default_config_of_peft_is_accepted(tmp_path: Path) -> None:
    LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text()
    config = read_config(text, MAX_RANK)
    assert (config.rank, config.alpha, config.use_rslora) == (8, 8.0, False)
    assert set(config.target_modules or ()) == {"q_proj", "v_proj"}
    assert config.uploaded_json == text
    assert json.loads(text).keys() <= COMPUTED_KEYS | INERT_KEYS | REFUSED_KEYS.keys()


def test_the_lists_are_apart_and_hold_every_key_of_peft() -> None:
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names <= SET.keys()
    assert SET.keys() == COMPUTED_KEYS | INERT_KEYS | REFUSED_KEYS.keys()
    assert len(SET) == len(COMPUTED_KEYS) + len(INERT_KEYS) + len(REFUSED_KEYS)


@pytest.mark.parametrize("key", sorted(SET))
def test_a_key_set_to_something_else_has_its_effect_or_is_refused(key: str) -> None:
    fields = MINIMAL | {key: SET[key]}
    if key in REFUSED_KEYS or key == "peft_type":
        assert refusal(json.dumps(fields)).field == key
    elif key in INERT_KEYS:
        assert read(**fields).canonical_json() == read().canonical_json()
    else:
        changed, plain = read(**fields), read()
        parts = [field.name for field in dataclasses.fields(AdapterConfig)]
        parts.remove("uploaded_json")
        differs = [part for part in parts if getattr(changed, part) != getattr(plain, part)]
        assert differs or key == "layers_pattern"


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
@pytest.mark.parametrize("value", [None, False, 0, "", []])
def test_a_refused_key_may_stand_there_unset(key: str, value: object) -> None:
    assert read(**{key: value}).canonical_json() == read().canonical_json()


@pytest.mark.parametrize("key", ["arrow_config", "kasa_config", "monteclora_config", "use_bdlora"])
def test_an_empty_object_switches_a_variant_on(key: str) -> None:
    assert refusal(json.dumps(MINIMAL | {key: {}})).field == key


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_key_without_a_value_is_passed_over(value: object) -> None:
    read(something_new=value)


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}])
def test_an_unknown_key_with_a_value_is_refused(value: object) -> None:
    assert refusal(json.dumps(MINIMAL | {"something_new": value})).field == "something_new"


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_inits_that_keep_the_base_are_inert(init: object) -> None:
    assert read(init_lora_weights=init).canonical_json() == read().canonical_json()


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "unheard-of", 1, {}]
)
def test_inits_that_change_the_base_are_refused(init: object) -> None:
    assert refusal(json.dumps(MINIMAL | {"init_lora_weights": init})).field == "init_lora_weights"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", None),
        ("peft_type", "lora"),
        ("peft_type", ["LORA"]),
        ("r", None),
        ("r", 0),
        ("r", -1),
        ("r", MAX_RANK + 1),
        ("r", 8.0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("lora_alpha", 1e39),
        ("use_rslora", 1),
        ("use_rslora", "yes"),
        ("use_dora", 1),
        ("alora_invocation_tokens", []),
        ("alora_invocation_tokens", 7),
        ("alora_invocation_tokens", "<answer>"),
        ("alora_invocation_tokens", [1, True]),
        ("alora_invocation_tokens", [1, 2.0]),
        ("alora_invocation_tokens", [-1]),
        ("alora_invocation_tokens", [1] * (MAX_INVOCATION_TOKENS + 1)),
        ("rank_pattern", []),
        ("rank_pattern", {"q_proj": MAX_RANK + 1}),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", 1),
        ("target_modules", ["q_proj", 1]),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", [None]),
        ("exclude_modules", ".*q_proj"),  # evaluated by PEFT alone
        ("layers_pattern", 3),
        ("layers_to_transform", "0"),
        ("layers_to_transform", [0, True]),
        ("layers_to_transform", [0.0]),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(key: str, value: object) -> None:
    error = refusal(json.dumps(MINIMAL | {key: value}))
    assert error.field is not None
    assert error.field.startswith(key)


@pytest.mark.parametrize("pattern", [None, "", [], "layers", ["layers"], ["h", "layers"]])
def test_a_layers_pattern_that_finds_the_layers(pattern: object) -> None:
    fields = {"layers_to_transform": [0], "layers_pattern": pattern}
    assert read(target_modules=["q_proj"], **fields).layers == frozenset({0})


@pytest.mark.parametrize("pattern", ["h", ["h"], ["blocks", "h"], ["(", "layers"], ".*"])
def test_one_that_finds_none_is_refused_where_layers_are_named(pattern: object) -> None:
    fields = {"layers_to_transform": [0], "layers_pattern": pattern}
    assert refusal(json.dumps(MINIMAL | fields)).field == "layers_pattern"
    read(layers_to_transform=[], layers_pattern=pattern)


@pytest.mark.parametrize(
    "name",
    [
        "^q_proj",
        "q_proj$",
        "(q|k)_proj",
        ".*q_proj",
        "[qk]_proj",
        "q\\.proj",
        "(a+)+b",
        "",
        "q proj",
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_key_that_is_a_regular_expression_is_refused(key: str, name: str) -> None:
    assert refusal(json.dumps(MINIMAL | {key: {name: 4}})).field == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "[" * 60_000,
        '{"a": ' * 10_000,
        '{"peft_type": "LORA", "r": 8, "r": 9, "lora_alpha": 1}',
        '{"peft_type": "LORA", "r": 8, "lora_alpha": NaN}',
        '{"peft_type": "LORA", "r": 8, "lora_alpha": -Infinity}',
        '{"peft_type": "LORA", "r": ' + "9" * 5_000 + ', "lora_alpha": 1}',
        json.dumps(MINIMAL) + "x",
        json.dumps(MINIMAL | {"revision": "x" * (64 << 10)}),
        "\ud800",
    ],
)
def test_what_is_not_one_small_json_object_is_refused(text: str) -> None:
    assert refusal(text).field == "adapter_config.json"


def test_an_infinite_alpha_is_refused() -> None:
    assert refusal('{"peft_type": "LORA", "r": 8, "lora_alpha": 1e999}').field == "lora_alpha"


@settings(deadline=None)
@given(st.text(max_size=200) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_any_text_is_a_config_or_refused(text: str) -> None:
    assert refusal(text).code.name == "INVALID_ARGUMENT"


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(SET)) | st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
            max_leaves=5,
        ),
    )
)
def test_any_object_is_a_config_or_refused(fields: dict[str, Any]) -> None:
    messages = []
    try:
        read_config(json.dumps(MINIMAL | fields), MAX_RANK)
    except AdapterInvalidError as error:
        messages.append(error.message.encode())
    assert all(len(message) < 1_000 for message in messages)


_NAMES = st.text(alphabet="ab.", min_size=1, max_size=8)


@settings(deadline=None)
@given(pattern=st.lists(_NAMES, unique=True, max_size=4), name=_NAMES)
def test_pattern_keys_match_as_in_peft(pattern: list[str], name: str) -> None:
    config = read(rank_pattern={key: index + 1 for index, key in enumerate(pattern)}, r=60)
    expected = get_pattern_key(pattern, name)
    assert config.rank_of(name) == (pattern.index(expected) + 1 if expected in pattern else 60)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj"),
        ("self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("proj", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"),
        ("up.proj", "model.layers.0.mlp.up_proj"),
        (".up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_a_key_matches_a_name_as_peft_would(key: str, name: str) -> None:
    assert matches(key, name) == bool(re.match(rf"(.*\.)?({key})$", name))


def test_the_first_match_wins_in_the_order_of_the_file() -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert read(rank_pattern={"q_proj": 2, "self_attn.q_proj": 4}).rank_of(name) == 2
    assert read(rank_pattern={"self_attn.q_proj": 4, "q_proj": 2}).rank_of(name) == 4


def test_the_version_is_of_what_the_result_depends_on() -> None:
    def version(weights: str = "00", base: str = "base", **fields: Any) -> str:
        return version_of(weights, read(**fields), base)

    plain = version()
    assert re.fullmatch("[0-9a-f]{64}", plain)
    same = [
        version(lora_alpha=16.0),
        version(lora_dropout=0.3, base_model_name_or_path="x", target_modules=["q_proj"]),
        version(use_rslora=None, rank_pattern={}, init_lora_weights="eva"),
    ]
    assert set(same) == {plain}
    others = [
        version(weights="01"),
        version(base="other"),
        version(r=4),
        version(lora_alpha=17),
        version(use_rslora=True),
        version(rank_pattern={"q_proj": 2, "k_proj": 4}),
        version(rank_pattern={"k_proj": 4, "q_proj": 2}),
        version(alpha_pattern={"q_proj": 2}),
        version(use_dora=True),
        version(alora_invocation_tokens=[1, 2]),
        version(alora_invocation_tokens=[2, 1]),
    ]
    assert len({plain, *others}) == len(others) + 1


def test_the_version_of_a_plain_adapter_is_what_it_always_was() -> None:
    """It is in stores and in clients' hands."""
    unset = read(use_dora=False, alora_invocation_tokens=None, fan_in_fan_out=True)
    for config in (read(), unset):
        assert version_of("00", config, "base").startswith("0c6072ad391cdce7")


def test_an_activated_adapter_with_dora_is_refused() -> None:
    fields = {"use_dora": True, "alora_invocation_tokens": [1]}
    assert refusal(json.dumps(MINIMAL | fields)).field == "alora_invocation_tokens"


def test_the_base_models_name_is_kept_but_changes_nothing() -> None:
    assert read(base_model_name_or_path="a/b").base_model == "a/b"
    assert read(base_model_name_or_path=["a"]).base_model is None
