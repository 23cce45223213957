"""What a checkpoint's config.json says about its decoder, checked before a weight is read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loraplex.errors import ModelError

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a decoder layer, in the order of the adapter tables' module axis."""

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""The modules along the vocabulary, by the names that a checkpoint or an adapter gives them."""

ARCHITECTURES = ("LlamaForCausalLM",)


class LinearShape(NamedTuple):
    """One quantised linear of the base, by the name a checkpoint or an adapter gives it."""

    name: str  # "model.layers.0.self_attn.q_proj"
    layer: int
    module: str  # one of MODULES
    out_features: int
    in_features: int


class ModuleShape(NamedTuple):
    """What an adapter may adapt: a linear, or one of the modules along the vocabulary."""

    name: str
    layer: int | None  # None along the vocabulary
    module: str  # the name's last part
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3's frequency scaling (config: rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base frequency, and how it is stretched."""

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Rope | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family decoder's shape."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope

    @property
    def module_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of each of MODULES."""
        hidden, inter = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            (q, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, q),
            (inter, hidden),
            (inter, hidden),
            (hidden, inter),
        )

    def linears(self) -> Iterator[LinearShape]:
        for layer in range(self.num_layers):
            for module, (out_features, in_features) in zip(
                MODULES, self.module_shapes, strict=True
            ):
                name = f"{linear_prefix(layer, module)}.{module}"
                yield LinearShape(name, layer, module, out_features, in_features)

    def adaptable(self) -> Iterator[ModuleShape]:
        """The linears, then embed_tokens, whose inputs are the vocabulary, and lm_head."""
        hidden, vocab = self.hidden_size, self.vocab_size
        yield from (ModuleShape(*shape) for shape in self.linears())
        yield ModuleShape(EMBEDDING, None, "embed_tokens", hidden, vocab)
        yield ModuleShape(HEAD, None, HEAD, vocab, hidden)


def linear_prefix(layer: int, module: str) -> str:
    part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{part}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint folder, or a ModelError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: is this a Hugging Face model folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return value


def read_model_config(folder: Path) -> ModelConfig:
    """Parse `config.json` of an unquantised or bitsandbytes checkpoint.

    Raises ModelError naming the key, for anything this server would not compute exactly.
    """
    raw = read_json(folder / "config.json")
    names = raw.get("architectures") or ["(none)"]
    if names[0] not in ARCHITECTURES:
        raise ModelError(
            f"architecture {names[0]} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported (silu)")
    num_heads = _integer(raw, "num_attention_heads")
    config = ModelConfig(
        architecture=names[0],
        hidden_size=_integer(raw, "hidden_size"),
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
        head_dim=_integer(raw, "head_dim", _integer(raw, "hidden_size") // num_heads),
        vocab_size=_integer(raw, "vocab_size"),
        context_length=_integer(raw, "max_position_embeddings", 2048),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        rope=_rope(raw),
    )
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelError("config.json: num_attention_heads is no multiple of num_key_value_heads")
    if config.head_dim % 2:
        raise ModelError(f"config.json: head_dim {config.head_dim} is odd")
    for module, (out_features, in_features) in zip(MODULES, config.module_shapes, strict=True):
        if in_features % 64:
            raise ModelError(
                f"config.json: {module} has {in_features} inputs; NF4 blocks need a multiple of 64"
            )
        if out_features % 2:
            raise ModelError(f"config.json: {module} has an odd number of outputs ({out_features})")


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelError(f"config.json: {key} must be a positive number, not {value!r}")
    return float(value)


def _rope(raw: Mapping[str, Any]) -> Rope:
    """Both spellings: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`."""
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    parameters = raw.get(key) or {}
    if not isinstance(parameters, dict):
        raise ModelError(f"config.json: {key} must be an object, not {parameters!r}")
    theta = _number(parameters, "rope_theta", _number(raw, "rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, linear_factor=_number(parameters, "factor"))
    if kind != "llama3":
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported (default, linear, llama3)"
        )
    llama3 = Llama3Rope(
        factor=_number(parameters, "factor"),
        low_freq_factor=_number(parameters, "low_freq_factor"),
        high_freq_factor=_number(parameters, "high_freq_factor"),
        original_max_position=_integer(parameters, "original_max_position_embeddings"),
    )
    return Rope(theta, llama3=llama3)
