"""What a tensor of an adapter is to the base model, by its name.

PEFT writes `base_model.model.<module>.lora_A.weight`, and without the prefix for layers injected
into a bare model. Trainers that save a wrapped model's own state (torch.compile, FSDP, activation
checkpointing, DDP) leave the wrappers' names in between and PEFT's name of the adapter behind; both
say nothing of the module and are left out. PEFT itself would pass such tensors over with a warning.
"""

from collections.abc import Mapping
from enum import Enum

from loraplex.adapters.peft_config import BaseLinear
from loraplex.adapters.safetensors_header import shown
from loraplex.errors import AdapterInvalidError

_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DDP = "module."  # before everything else
_ADAPTER_NAME = "default"  # PEFT's own choice; it follows one of these
_NAMED = frozenset(
    {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
)


class Role(Enum):
    """What a tensor is of its module."""

    A = "lora_A"
    B = "lora_B"
    MAGNITUDE = "lora_magnitude_vector"
    BASE = "base"  # the base model's own weight, saved along


_SUFFIXES = {
    ".lora_A.weight": Role.A,
    ".lora_B.weight": Role.B,
    ".lora_magnitude_vector": Role.MAGNITUDE,
    ".lora_magnitude_vector.weight": Role.MAGNITUDE,
}
_EMBEDDING_SUFFIXES = {
    ".lora_embedding_A": Role.A,
    ".lora_embedding_B": Role.B,
    ".lora_magnitude_vector": Role.MAGNITUDE,
    ".lora_magnitude_vector.weight": Role.MAGNITUDE,
}
# PEFT saves these two along when they are adapted, or when the vocabulary was resized.
_BASE_SUFFIXES = {".weight": Role.BASE, ".base_layer.weight": Role.BASE}

# Parts of a tensor's name that say what it is, when it is nothing of a module that can be adapted.
_FOREIGN_PARTS = (
    ("modules_to_save", "replacing whole modules of the base model is not served"),
    ("token_adapter", "trained token embeddings are not served"),
    ("trainable_tokens", "trained token embeddings are not served"),
    (".bias", "biases are not served"),
)


def role_of(tensor: str, modules: Mapping[str, BaseLinear]) -> tuple[Role, BaseLinear]:
    """AdapterInvalidError for a tensor that is nothing of one of `modules`, by their names."""
    name = normalised(tensor)
    for suffixes in (_SUFFIXES, _EMBEDDING_SUFFIXES, _BASE_SUFFIXES):
        for suffix, role in suffixes.items():
            module = modules.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
            if module is not None and suffixes in _suffixes_of(module):
                return role, module
    why = next(
        (why for part, why in _FOREIGN_PARTS if part in tensor),
        "is not the lora_A.weight or lora_B.weight of a linear of this base model",
    )
    raise AdapterInvalidError(shown(tensor), why)


def _suffixes_of(module: BaseLinear) -> tuple[Mapping[str, Role], ...]:
    if module.layer is not None:
        return (_SUFFIXES,)
    return (_EMBEDDING_SUFFIXES if module.module == "embed_tokens" else _SUFFIXES, _BASE_SUFFIXES)


def normalised(tensor: str) -> str:
    """`<module>.lora_A.weight` and so on, as PEFT names it in a bare model."""
    parts = [part for part in tensor.split(".") if part not in _WRAPPERS]
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not (part == _ADAPTER_NAME and before in _NAMED)
    ]
    return ".".join(kept).removeprefix(_DDP).removeprefix(_PREFIX)
