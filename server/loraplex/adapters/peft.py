"""PEFT LoRA adapters as they come over the wire: what is computed exactly, and what is refused.

Two files say what an adapter is. `adapter_config.json` holds the ranks and scales; its keys fall in
three lists: computed, inert for inference, refused when set. The safetensors file says which
linears are adapted. Both are read without torch, and whatever PEFT would compute differently is
refused, naming the key or the tensor.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loraplex.adapters.safetensors_header import (
    TensorEntry,
    check_finite,
    check_second_opinion,
    load_json_object,
    read_header,
    shown,
)
from loraplex.errors import AdapterInvalidError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 64 << 10

COMPUTED_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
# What trains or describes an adapter, and what acts only on modules that are refused anyway.
# Of init_lora_weights only the values that leave the base model's weights alone.
INERT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
REFUSED_KEYS: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served",
    "arrow_config": "Arrow routing is not served",
    "bias": "trained biases are not served; only 'none' is",
    "fan_in_fan_out": "transposed base weights are not served",
    "kasa_config": "KaSA changes the base model's weights",
    "layer_replication": "the base model's layers are served as they are",
    "lora_bias": "a bias in the adapter is not served",
    "modules_to_save": "replacing whole modules of the base model is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "target_parameters": "adapting bare parameters is not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_dora": "DoRA is not served by this version",
    "use_qalora": "QALoRA is not served",
    "velora_config": "VeLoRA is not served",
}
# The others (pissa, corda, olora, loftq) change the base model's weights again whenever PEFT loads
# the adapter, and the file holds only the difference to those.
_INITS_THAT_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_FLOAT32_MAX = 3.4028234663852886e38  # scales are float32 on the device
_T = TypeVar("_T")

# PEFT saves a model's tensors with this prefix, and layers injected into a bare model without it.
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
# Parts of a tensor's name that say what it is, when it is no LoRA matrix of a linear.
_FOREIGN_PARTS = (
    ("lora_magnitude_vector", "DoRA is not served by this version"),
    ("lora_embedding_", "adapted embeddings are not served"),
    ("embed_tokens", "adapted or retrained embeddings are not served"),
    ("lm_head", "an adapted or retrained output head is not served"),
    ("modules_to_save", "replacing whole modules of the base model is not served"),
    (".bias", "biases are not served"),
)


@dataclass(frozen=True, slots=True)
class BaseLinear:
    """A linear of the base model that an adapter may adapt; `name` is the base model's own."""

    name: str  # "model.layers.0.self_attn.q_proj"
    layer: int
    module: str  # "q_proj"
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class AdapterMatrix:
    """A matrix as it lies in the safetensors file: its bytes are `start` to `end` of the file."""

    tensor: str
    dtype: str  # "F16", "BF16" or "F32"
    shape: tuple[int, int]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What an adapter adds to one linear: scale * B @ A @ x."""

    base: BaseLinear
    rank: int
    scale: float
    a: AdapterMatrix  # [rank, in_features]
    b: AdapterMatrix  # [out_features, rank]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter that this server computes exactly."""

    modules: tuple[AdapterModule, ...]  # in the order of the base model's linears
    rank: int  # the largest
    target_modules: tuple[str, ...]  # the adapted modules' short names, sorted
    warnings: tuple[str, ...]
    config_json: str  # canonical
    uploaded_config_json: str


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of an adapter_config.json bears on the result. Patterns keep the file's order."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: tuple[str, ...] | None  # None: a regular expression, or nothing said
    exclude_modules: tuple[str, ...]
    layers: frozenset[int] | None  # None: all
    base_model: str | None  # informational
    uploaded_json: str

    def rank_of(self, name: str) -> int:
        return _first_match(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, for the linear called `name`."""
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def excludes(self, base: BaseLinear) -> str | None:
        """The key by which PEFT would pass this linear over, as far as that is said literally."""
        if any(_names(entry, base.name) for entry in self.exclude_modules):
            return "exclude_modules"
        if self.target_modules is None or base.name in self.target_modules:
            return None
        if not any(_names(entry, base.name) for entry in self.target_modules):
            return "target_modules"
        if self.layers is not None and base.layer not in self.layers:
            return "layers_to_transform"
        return None

    def canonical_json(self) -> str:
        """What the result depends on beside the tensors, always written the same way."""
        fields = {
            "alpha_pattern": self.alpha_pattern,
            "lora_alpha": self.alpha,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "use_rslora": self.use_rslora,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def read_config(config_json: str, max_rank: int) -> AdapterConfig:
    """Parse and judge an adapter_config.json; AdapterInvalidError names the key that is refused."""
    try:
        size = len(config_json.encode())
    except UnicodeEncodeError:
        raise AdapterInvalidError(CONFIG_NAME, "is not Unicode text") from None
    if size > MAX_CONFIG_BYTES:
        raise AdapterInvalidError(CONFIG_NAME, f"is longer than {MAX_CONFIG_BYTES} bytes")
    fields = load_json_object(config_json, CONFIG_NAME)
    _check_keys(fields)
    _check_init(fields.get("init_lora_weights"))
    base_model = fields.get("base_model_name_or_path")
    target_modules = _strings(fields, "target_modules")
    _strings(fields, "layers_pattern")
    return AdapterConfig(
        rank=_rank("r", fields.get("r"), max_rank),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=_flag(fields, "use_rslora"),
        rank_pattern=_pattern(fields, "rank_pattern", lambda key, v: _rank(key, v, max_rank)),
        alpha_pattern=_pattern(fields, "alpha_pattern", _alpha),
        target_modules=target_modules or None,
        exclude_modules=_strings(fields, "exclude_modules"),
        layers=_layers(fields.get("layers_to_transform")),
        base_model=base_model if isinstance(base_model, str) else None,
        uploaded_json=config_json,
    )


def read_adapter(
    path: Path, config: AdapterConfig, linears: Mapping[str, BaseLinear], max_rank: int
) -> AdapterSpec:
    """Judge the weights file against the config and the base model's linears, by name and shape.

    AdapterInvalidError names the tensor that is refused.
    """
    entries = read_header(path)
    pairs = _pair(entries, linears)
    modules = tuple(
        _module(base, pairs[base.name], config, max_rank)
        for base in linears.values()
        if base.name in pairs
    )
    check_finite(path, entries)
    check_second_opinion(path, entries)
    return AdapterSpec(
        modules=modules,
        rank=max(module.rank for module in modules),
        target_modules=tuple(sorted({module.base.module for module in modules})),
        warnings=tuple(_warnings(config, [module.base.name for module in modules])),
        config_json=config.canonical_json(),
        uploaded_config_json=config.uploaded_json,
    )


def version_of(weights_sha256: str, config: AdapterConfig, base_id: str) -> str:
    """The content's identity: 64 hexadecimal digits over weights, canonical config and base."""
    identity = {"base": base_id, "config": config.canonical_json(), "weights": weights_sha256}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def matches(key: str, name: str) -> bool:
    r"""Whether a key of rank_pattern or alpha_pattern applies to the linear called `name`.

    PEFT matches the regular expression `(.*\.)?(key)$`, and a key here holds letters, digits, `_`,
    `-` and dots only. So: the key is `name`, or ends it after a dot, where a dot in the key stands
    for any character.
    """
    start = len(name) - len(key)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    for piece in key.split("."):
        if not name.startswith(piece, start):
            return False
        start += len(piece) + 1
    return True


def _first_match(pattern: Iterable[tuple[str, _T]], name: str, default: _T) -> _T:
    return next((value for key, value in pattern if matches(key, name)), default)


def _names(entry: str, name: str) -> bool:
    """How PEFT reads an entry of a list of modules: the whole name, or its end after a dot."""
    return name == entry or name.endswith(f".{entry}")


def _check_keys(fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise AdapterInvalidError("peft_type", "must be LORA")
    for key, value in fields.items():
        if key in COMPUTED_KEYS or key in INERT_KEYS:
            continue
        if key not in REFUSED_KEYS:
            if value:
                raise AdapterInvalidError(shown(key), "is not a key that this server knows")
        # PEFT takes an empty object for a configuration of defaults, which switches a variant on.
        elif (value or isinstance(value, dict)) and (key, value) != ("bias", "none"):
            raise AdapterInvalidError(key, f"must not be set: {REFUSED_KEYS[key]}")


def _check_init(value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str) or value.lower() not in _INITS_THAT_KEEP_THE_BASE:
        raise AdapterInvalidError(
            "init_lora_weights",
            "PEFT would change the base model's weights when it loads this adapter; save it as"
            " plain LoRA (path_initial_model_for_weight_conversion) and upload that",
        )


def _rank(key: str, value: object, max_rank: int) -> int:
    if type(value) is not int or not 1 <= value <= max_rank:
        raise AdapterInvalidError(key, f"must be a whole number from 1 to {max_rank}")
    return value


def _alpha(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterInvalidError(key, "must be a number")
    if not abs(value) <= _FLOAT32_MAX:
        raise AdapterInvalidError(key, "must be finite")
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise AdapterInvalidError(key, "must be true or false")
    return bool(value)


def _pattern(
    fields: Mapping[str, Any], key: str, read: Callable[[str, object], _T]
) -> tuple[tuple[str, _T], ...]:
    value = fields.get(key)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise AdapterInvalidError(key, "must map the names of modules to numbers")
    for name in value:
        if not _LITERAL.fullmatch(name):
            raise AdapterInvalidError(
                key, f"{shown(name)!r} must be the dotted end of a module's name, not a pattern"
            )
    return tuple((name, read(f"{key}[{shown(name)}]", item)) for name, item in value.items())


def _strings(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The strings of a list; nothing for a lone string, a regular expression never evaluated."""
    value = fields.get(key)
    if value is None or isinstance(value, str):
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterInvalidError(key, "must be a list of strings, or one string")
    return tuple(value)


def _layers(value: object) -> frozenset[int] | None:
    layers = [value] if type(value) is int else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list) or not all(type(item) is int for item in layers):
        raise AdapterInvalidError("layers_to_transform", "must be a list of whole numbers, or one")
    return frozenset(layers)


def _pair(
    entries: Iterable[TensorEntry], linears: Mapping[str, BaseLinear]
) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """A and B of every adapted linear, by the linear's name."""
    sides: tuple[dict[str, TensorEntry], dict[str, TensorEntry]] = ({}, {})
    for entry in entries:
        side, name = _side_and_linear(entry.name, linears)
        other = sides[side].setdefault(name, entry)
        if other is not entry:
            raise AdapterInvalidError(
                shown(entry.name), f"is the same matrix as {shown(other.name)}"
            )
    a, b = sides
    for name, entry in (a | b).items():
        if name not in a or name not in b:
            raise AdapterInvalidError(
                shown(entry.name), f"has no {'lora_B' if name in a else 'lora_A'} beside it"
            )
    return {name: (a[name], b[name]) for name in a}


def _side_and_linear(tensor: str, linears: Mapping[str, BaseLinear]) -> tuple[int, str]:
    name = tensor.removeprefix(_PREFIX)
    for side, suffix in enumerate(_SUFFIXES):
        if name.endswith(suffix) and name.removesuffix(suffix) in linears:
            return side, name.removesuffix(suffix)
    why = next(
        (why for part, why in _FOREIGN_PARTS if part in tensor),
        "is not the lora_A.weight or lora_B.weight of a linear of this base model",
    )
    raise AdapterInvalidError(shown(tensor), why)


def _module(
    base: BaseLinear, pair: tuple[TensorEntry, TensorEntry], config: AdapterConfig, max_rank: int
) -> AdapterModule:
    a, b = pair
    excluded_by = config.excludes(base)
    if excluded_by is not None:
        raise AdapterInvalidError(
            shown(a.name), f"adapts a module that {excluded_by} leaves out, so PEFT would ignore it"
        )
    rank = config.rank_of(base.name)
    if max(rank, a.shape[0]) > max_rank:
        raise AdapterInvalidError(
            shown(a.name), f"rank {max(rank, a.shape[0])} is over this server's {max_rank}"
        )
    return AdapterModule(
        base=base,
        rank=rank,
        scale=config.scale_of(base.name, rank),
        a=_matrix(a, rank, base.in_features),
        b=_matrix(b, base.out_features, rank),
    )


def _matrix(entry: TensorEntry, rows: int, columns: int) -> AdapterMatrix:
    if entry.shape != (rows, columns):
        raise AdapterInvalidError(
            shown(entry.name),
            f"has the shape {list(entry.shape)}, but {[rows, columns]} is what the base model and"
            " the config's ranks (r, rank_pattern) make of it",
        )
    return AdapterMatrix(entry.name, entry.dtype, (rows, columns), entry.start, entry.end)


def _warnings(config: AdapterConfig, adapted: list[str]) -> Iterator[str]:
    """What the config says without effect: one line for a key."""
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    idle = {
        key: [entry for entry, _ in pattern if not any(matches(entry, name) for name in adapted)]
        for key, pattern in patterns.items()
    }
    idle["target_modules"] = [
        entry
        for entry in config.target_modules or ()
        if not any(_names(entry, name) for name in adapted)
    ]
    for key, entries in idle.items():
        if entries:
            more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
            names = ", ".join(shown(entry) for entry in entries[:3])
            yield f"{key}: no tensor of the adapter belongs to {names}{more}"
