"""A tensor's name says what it is to the base, however the trainer had wrapped the model."""

import pytest
from loraplex.adapters.peft_config import BaseLinear
from loraplex.adapters.peft_names import Role, role_of
from loraplex.errors import AdapterInvalidError

Q = "model.layers.0.self_attn.q_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
MODULES = {
    Q: BaseLinear(Q, 0, "q_proj", 6, 4),
    EMBED: BaseLinear(EMBED, None, "embed_tokens", 4, 9),
    HEAD: BaseLinear(HEAD, None, "lm_head", 9, 4),
}
KNOWN = {
    f"base_model.model.{Q}.lora_A.weight": (Role.A, Q),
    f"{Q}.lora_B.weight": (Role.B, Q),
    f"base_model.model.{Q}.lora_magnitude_vector": (Role.MAGNITUDE, Q),
    f"base_model.model.{Q}.lora_magnitude_vector.weight": (Role.MAGNITUDE, Q),
    f"base_model.model.{EMBED}.lora_embedding_A": (Role.A, EMBED),
    f"base_model.model.{EMBED}.lora_embedding_B": (Role.B, EMBED),
    f"base_model.model.{EMBED}.base_layer.weight": (Role.BASE, EMBED),
    f"base_model.model.{EMBED}.weight": (Role.BASE, EMBED),
    f"base_model.model.{HEAD}.lora_A.weight": (Role.A, HEAD),
    f"base_model.model.{HEAD}.base_layer.weight": (Role.BASE, HEAD),
    # A model's own state, with PEFT's name of the adapter.
    f"base_model.model.{Q}.lora_A.default.weight": (Role.A, Q),
    f"base_model.model.{Q}.lora_magnitude_vector.default.weight": (Role.MAGNITUDE, Q),
    f"base_model.model.{EMBED}.lora_embedding_A.default": (Role.A, EMBED),
    # torch.compile, of the whole or of each layer.
    f"_orig_mod.base_model.model.{Q}.lora_A.weight": (Role.A, Q),
    f"base_model.model._orig_mod.{Q}.lora_A.weight": (Role.A, Q),
    "base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_B.weight": (Role.B, Q),
    # FSDP, activation checkpointing, DDP, and all of them.
    f"_fsdp_wrapped_module.base_model.model.{Q}.lora_A.weight": (Role.A, Q),
    "base_model.model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn"
    ".q_proj._fsdp_wrapped_module.lora_A.default._fsdp_wrapped_module.weight": (Role.A, Q),
    f"module.base_model.model.{Q}.lora_A.weight": (Role.A, Q),
    f"module._orig_mod._fsdp_wrapped_module.base_model.model.{HEAD}.lora_B.weight": (Role.B, HEAD),
}
UNKNOWN = (
    "",
    Q,
    f"{Q}.weight",
    f"{Q}.base_layer.weight",
    f"{Q}.lora_A",
    f"{Q}.lora_a.weight",
    f"{Q}.lora_A.bias",
    f"{Q}.lora_A.other.weight",
    f"{Q}.lora_A.default.default.weight",
    f"{Q}.default.lora_A.weight",
    f"{Q}.lora_embedding_A",
    f"{EMBED}.lora_A.weight",
    f"{HEAD}.lora_embedding_B",
    f"base_model.{Q}.lora_A.weight",
    f"base_model.model.base_model.model.{Q}.lora_A.weight",
    f"model.{Q}.lora_A.weight",
    f"{Q}x.lora_A.weight",
    f"x{Q}.lora_A.weight",
    f"base_model.model.{EMBED}.modules_to_save.weight",
    f"base_model.model.{EMBED}.token_adapter.trainable_tokens_delta",
)


@pytest.mark.parametrize("tensor", KNOWN)
def test_a_name_that_is_understood(tensor: str) -> None:
    role, module = role_of(tensor, MODULES)
    assert (role, module.name) == KNOWN[tensor]


@pytest.mark.parametrize("tensor", UNKNOWN)
def test_any_other_name_is_refused(tensor: str) -> None:
    with pytest.raises(AdapterInvalidError) as caught:
        role_of(tensor, MODULES)
    assert caught.value.field == tensor
