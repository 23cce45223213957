"""PEFT LoRA adapters as they come over the wire: what is computed exactly, and what is refused.

Two files say what an adapter is. `adapter_config.json` holds the ranks and scales; its keys fall in
three lists: computed, inert for inference, refused when set. The safetensors file says which
modules are adapted. Both are read without torch, and whatever PEFT would compute differently is
refused, naming the key or the tensor.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.peft_config import (
    CONFIG_NAME,
    AdapterConfig,
    BaseLinear,
    matches,
    names,
    read_config,
)
from loraplex.adapters.peft_names import Role, role_of
from loraplex.adapters.safetensors_header import (
    TensorEntry,
    check_finite,
    check_second_opinion,
    read_header,
    shown,
)
from loraplex.errors import AdapterInvalidError

__all__ = [
    "CONFIG_NAME",
    "AdapterConfig",
    "AdapterModule",
    "AdapterSpec",
    "AdapterTensor",
    "BaseCopy",
    "BaseLinear",
    "read_adapter",
    "read_config",
    "version_of",
]


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """A tensor as it lies in the safetensors file: its bytes are `start` to `end` of the file."""

    tensor: str
    dtype: str  # "F16", "BF16" or "F32"
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """What an adapter adds to one module: scale * B @ A @ x, with x one-hot for embed_tokens."""

    base: BaseLinear
    rank: int
    scale: float
    a: AdapterTensor  # [rank, in_features]
    b: AdapterTensor  # [out_features, rank]
    magnitude: AdapterTensor | None = None  # [out_features], with DoRA


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A weight of the base model that came along; must be the served one's equal."""

    tensor: str
    name: str  # of the base's module


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter that this server computes exactly."""

    modules: tuple[AdapterModule, ...]  # in the order of the base model's own
    rank: int  # the largest
    target_modules: tuple[str, ...]  # the adapted modules' short names, sorted
    warnings: tuple[str, ...]
    config_json: str  # canonical
    uploaded_config_json: str
    use_dora: bool = False
    invocation_tokens: tuple[int, ...] = ()  # of an activated LoRA
    base_copies: tuple[BaseCopy, ...] = ()


def read_adapter(
    path: Path, config: AdapterConfig, linears: Mapping[str, BaseLinear], max_rank: int
) -> AdapterSpec:
    """Judge the weights file against the config and what of the base model may be adapted.

    AdapterInvalidError names the tensor that is refused.
    """
    entries = read_header(path)
    found = _sort(entries, linears)
    modules = tuple(
        _module(base, found[base.name], config, max_rank)
        for base in linears.values()
        if found.get(base.name, {}).keys() - {Role.BASE}
    )
    if not modules:
        raise AdapterInvalidError(shown(entries[0].name), "has no LoRA matrix beside it")
    _check_vocabulary(modules, config)
    check_finite(path, entries)
    check_second_opinion(path, entries)
    return AdapterSpec(
        modules=modules,
        rank=max(module.rank for module in modules),
        target_modules=tuple(sorted({module.base.module for module in modules})),
        warnings=tuple(_warnings(config, [module.base.name for module in modules])),
        config_json=config.canonical_json(),
        uploaded_config_json=config.uploaded_json,
        use_dora=config.use_dora,
        invocation_tokens=config.invocation_tokens,
        base_copies=tuple(
            _base_copy(linears[name], roles[Role.BASE])
            for name, roles in found.items()
            if Role.BASE in roles
        ),
    )


def version_of(weights_sha256: str, config: AdapterConfig, base_id: str) -> str:
    """The content's identity: 64 hexadecimal digits over weights, canonical config and base."""
    identity = {"base": base_id, "config": config.canonical_json(), "weights": weights_sha256}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


Roles = dict[Role, TensorEntry]


def _sort(entries: Iterable[TensorEntry], linears: Mapping[str, BaseLinear]) -> Mapping[str, Roles]:
    """What the file holds of each module of the base, by the module's name."""
    found: dict[str, Roles] = {}
    for entry in entries:
        role, base = role_of(entry.name, linears)
        other = found.setdefault(base.name, {}).setdefault(role, entry)
        if other is not entry:
            raise AdapterInvalidError(
                shown(entry.name), f"is the same matrix as {shown(other.name)}"
            )
    return found


def _module(base: BaseLinear, roles: Roles, config: AdapterConfig, max_rank: int) -> AdapterModule:
    first = next(entry for role, entry in roles.items() if role is not Role.BASE)
    excluded_by = config.excludes(base)
    if excluded_by is not None:
        raise AdapterInvalidError(
            shown(first.name),
            f"adapts a module that {excluded_by} leaves out, so PEFT would ignore it",
        )
    _check_complete(first, roles, config)
    a, b, magnitude = roles[Role.A], roles[Role.B], roles.get(Role.MAGNITUDE)
    rank = config.rank_of(base.name)
    if max(rank, a.shape[0]) > max_rank:
        raise AdapterInvalidError(
            shown(a.name), f"rank {max(rank, a.shape[0])} is over this server's {max_rank}"
        )
    return AdapterModule(
        base=base,
        rank=rank,
        scale=config.scale_of(base.name, rank),
        a=_tensor(a, (rank, base.in_features)),
        b=_tensor(b, (base.out_features, rank)),
        magnitude=None if magnitude is None else _tensor(magnitude, (base.out_features,)),
    )


def _check_complete(first: TensorEntry, roles: Roles, config: AdapterConfig) -> None:
    """Of each module A and B are there, and with DoRA its magnitudes."""
    wanted = [Role.A, Role.B, *([Role.MAGNITUDE] if config.use_dora else [])]
    missing = next((role.value for role in wanted if role not in roles), None)
    if missing is not None:
        raise AdapterInvalidError(shown(first.name), f"has no {missing} beside it")
    if Role.MAGNITUDE in roles and not config.use_dora:
        raise AdapterInvalidError(
            shown(roles[Role.MAGNITUDE].name), "is DoRA's, but the config does not set use_dora"
        )


def _check_vocabulary(modules: Iterable[AdapterModule], config: AdapterConfig) -> None:
    """What cannot be combined with adapting embed_tokens or lm_head."""
    for module in (module for module in modules if module.base.layer is None):
        if config.use_dora:
            raise AdapterInvalidError(
                shown(module.a.tensor), "DoRA is not served on embed_tokens and lm_head"
            )
        if config.invocation_tokens and module.base.module == "embed_tokens":
            raise AdapterInvalidError(
                shown(module.a.tensor), "PEFT knows no activated LoRA (aLoRA) on embeddings"
            )
        if config.ensure_weight_tying:
            raise AdapterInvalidError(
                "ensure_weight_tying", "adapters tied over embed_tokens and lm_head are not served"
            )


def _base_copy(base: BaseLinear, entry: TensorEntry) -> BaseCopy:
    shape = (base.out_features, base.in_features)
    tensor = _tensor(entry, shape[::-1] if base.module == "embed_tokens" else shape)
    return BaseCopy(tensor.tensor, base.name)


def _tensor(entry: TensorEntry, shape: tuple[int, ...]) -> AdapterTensor:
    if entry.shape != shape:
        raise AdapterInvalidError(
            shown(entry.name),
            f"has the shape {list(entry.shape)}, but {list(shape)} is what the base model and"
            " the config's ranks (r, rank_pattern) make of it",
        )
    return AdapterTensor(entry.name, entry.dtype, shape, entry.start, entry.end)


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
        if not any(names(entry, name) for name in adapted)
    ]
    for key, entries in idle.items():
        if entries:
            more = f" and {len(entries) - 3} more" if len(entries) > 3 else ""
            listed = ", ".join(shown(entry) for entry in entries[:3])
            yield f"{key}: no tensor of the adapter belongs to {listed}{more}"
    if config.fan_in_fan_out:
        yield "fan_in_fan_out: without effect, as in PEFT: this base's weights are [out, in]"
