"""An adapter_config.json: what of it is computed exactly, what is inert, and what is refused."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from loraplex.adapters.safetensors_header import load_json_object, shown
from loraplex.errors import AdapterInvalidError

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 64 << 10
MAX_INVOCATION_TOKENS = 1024

COMPUTED_KEYS = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "alora_invocation_tokens",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    }
)
# What trains or describes an adapter, and what acts only on modules that are refused anyway, or not
# at all: PEFT itself goes back to fan_in_fan_out=False for linears whose weights are [out, in].
# Of init_lora_weights only the values that leave the base model's weights alone, and of
# ensure_weight_tying whatever stands there while no module along the vocabulary is adapted.
INERT_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
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
    "arrow_config": "Arrow routing is not served",
    "bias": "trained biases are not served; only 'none' is",
    "kasa_config": "KaSA changes the base model's weights",
    "layer_replication": "the base model's layers are served as they are",
    "lora_bias": "a bias in the adapter is not served",
    "modules_to_save": "replacing whole modules of the base model is not served",
    "monteclora_config": "MonteCLoRA is not served",
    "target_parameters": "adapting bare parameters is not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_qalora": "QALoRA is not served",
    "velora_config": "VeLoRA is not served",
}
# The others (pissa, corda, olora, loftq) change the base model's weights again whenever PEFT loads
# the adapter, and the file holds only the difference to those.
_INITS_THAT_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")
_FLOAT32_MAX = 3.4028234663852886e38  # scales are float32 on the device
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BaseLinear:
    """What an adapter may adapt: a linear of the base model, or embed_tokens.

    `name` is the base model's own. The inputs of embed_tokens are the vocabulary.
    """

    name: str  # "model.layers.0.self_attn.q_proj"
    layer: int | None  # None: embed_tokens and lm_head, the modules along the vocabulary
    module: str  # "q_proj"
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of an adapter_config.json bears on the result. Patterns keep the file's order."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    invocation_tokens: tuple[int, ...]  # of an activated LoRA; else none
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: tuple[str, ...] | None  # None: a regular expression, or nothing said
    exclude_modules: tuple[str, ...]
    layers: frozenset[int] | None  # None: all
    ensure_weight_tying: bool  # matters to embed_tokens and lm_head alone
    fan_in_fan_out: bool  # without effect here
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
        if any(names(entry, base.name) for entry in self.exclude_modules):
            return "exclude_modules"
        if self.target_modules is None or base.name in self.target_modules:
            return None
        if not any(names(entry, base.name) for entry in self.target_modules):
            return "target_modules"
        if self.layers is not None and base.layer not in self.layers:
            return "layers_to_transform"
        return None

    def other_base(self, served: str) -> str | None:
        """The base that the adapter names, if its last part differs from what is served."""
        named = (self.base_model or "").rstrip("/")
        last = named.rsplit("/", 1)[-1].lower()
        return shown(named) if last and last != served.lower() else None

    def canonical_json(self) -> str:
        """What the result depends on beside the tensors, always written the same way."""
        fields: dict[str, object] = {
            "alpha_pattern": self.alpha_pattern,
            "lora_alpha": self.alpha,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "use_rslora": self.use_rslora,
        }
        if self.use_dora:
            fields["use_dora"] = True
        if self.invocation_tokens:
            fields["alora_invocation_tokens"] = self.invocation_tokens
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
    layers = _layers(fields.get("layers_to_transform"))
    _check_layers_pattern(fields, layers)
    use_dora = _flag(fields, "use_dora")
    invocation_tokens = _invocation_tokens(fields.get("alora_invocation_tokens"))
    if use_dora and invocation_tokens:
        raise AdapterInvalidError(
            "alora_invocation_tokens", "must not be set with use_dora: PEFT computes one of them"
        )
    return AdapterConfig(
        rank=_rank("r", fields.get("r"), max_rank),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=_flag(fields, "use_rslora"),
        use_dora=use_dora,
        invocation_tokens=invocation_tokens,
        rank_pattern=_pattern(fields, "rank_pattern", lambda key, v: _rank(key, v, max_rank)),
        alpha_pattern=_pattern(fields, "alpha_pattern", _alpha),
        target_modules=target_modules or None,
        exclude_modules=_excluded(fields),
        layers=layers,
        ensure_weight_tying=bool(fields.get("ensure_weight_tying")),
        fan_in_fan_out=bool(fields.get("fan_in_fan_out")),
        base_model=base_model if isinstance(base_model, str) else None,
        uploaded_json=config_json,
    )


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


def names(entry: str, name: str) -> bool:
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
        raise AdapterInvalidError(
            key, f"must be a whole number from 1 to {max_rank}, this server's --max-rank"
        )
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


def _excluded(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(value := fields.get("exclude_modules"), str) and value:
        raise AdapterInvalidError(
            "exclude_modules", "must be a list: regular expressions are not evaluated"
        )
    return _strings(fields, "exclude_modules")


def _check_layers_pattern(fields: Mapping[str, Any], layers: frozenset[int] | None) -> None:
    """PEFT finds a layer's number only behind one of these, each a regular expression."""
    value = fields.get("layers_pattern")
    entries = (value,) if isinstance(value, str) and value else _strings(fields, "layers_pattern")
    if layers is None or not entries:
        return
    if "layers" not in entries or not all(map(_LITERAL.fullmatch, entries)):
        raise AdapterInvalidError(
            "layers_pattern", "must name what this base model's layers stand in: layers"
        )


def _layers(value: object) -> frozenset[int] | None:
    layers = [value] if type(value) is int else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list) or not all(type(item) is int for item in layers):
        raise AdapterInvalidError("layers_to_transform", "must be a list of whole numbers, or one")
    return frozenset(layers)


def _invocation_tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise AdapterInvalidError("alora_invocation_tokens", "must be a list of token ids")
    if not value:
        raise AdapterInvalidError(
            "alora_invocation_tokens", "must not be empty: nothing would invoke the adapter"
        )
    if len(value) > MAX_INVOCATION_TOKENS:
        raise AdapterInvalidError(
            "alora_invocation_tokens", f"must be at most {MAX_INVOCATION_TOKENS} tokens"
        )
    return tuple(value)
