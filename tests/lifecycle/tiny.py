"""A tiny model that starts in no time, and adapters of every kind for it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from loraplex.model.config import linear_prefix, read_model_config
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from tests.e2e import random_llama

VOCAB = 256
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Content:
    """An adapter's files; what it says differs from the base and from every other's."""

    name: str
    folder: Path
    rank: int
    use_dora: bool = False
    invocation_tokens: tuple[int, ...] = ()

    @property
    def can_be_blended(self) -> bool:
        return not self.use_dora and not self.invocation_tokens

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"

    @property
    def config_json(self) -> str:
        return (self.folder / "adapter_config.json").read_text()


def write_model(folder: Path) -> Path:
    """A random Llama, and a tokenizer of one token a byte."""
    folder.mkdir(parents=True)
    random_llama.write_model(folder, VOCAB)
    tokens = {f"<{byte}>": byte for byte in range(VOCAB)}
    Tokenizer(models.WordLevel(tokens, unk_token="<0>")).save(str(folder / "tokenizer.json"))
    return folder


def write_contents(folder: Path, model: Path) -> list[Content]:
    """Plain, wide, DoRA, vocabulary and activated adapters, of 2 to 17 blocks each."""
    plain = [
        *((rank, ("q_proj", "v_proj")) for rank in (4, 8, 16, 20)),
        *((rank, _ALL) for rank in (4, 16)),
        (32, ("q_proj", "k_proj", "v_proj", "o_proj")),
        (8, ("q_proj", "lm_head")),
        (8, ("down_proj", "embed_tokens")),
    ]
    makers = [_Maker(folder / f"a{number}", model, number) for number in range(len(plain) + 3)]
    return [
        *(maker.write(*each) for maker, each in zip(makers, plain, strict=False)),
        *(
            maker.write(rank, _ALL, use_dora=True)
            for maker, rank in zip(makers[-3:-1], (4, 8), strict=True)
        ),
        makers[-1].write(4, ("o_proj",), invocation_tokens=(37,)),
    ]


@dataclass(frozen=True, slots=True)
class _Maker:
    folder: Path
    model: Path
    seed: int

    def write(
        self,
        rank: int,
        modules: Sequence[str],
        *,
        use_dora: bool = False,
        invocation_tokens: tuple[int, ...] = (),
    ) -> Content:
        self.folder.mkdir(parents=True)
        rng = np.random.default_rng(self.seed + 1)
        tensors = {}
        for linear in read_model_config(self.model).linears():
            if linear.module not in modules:
                continue
            name = f"base_model.model.{linear_prefix(linear.layer, linear.module)}.{linear.module}"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, linear.in_features)) / 8
            b = rng.standard_normal((linear.out_features, rank)) / rank**0.5
            tensors[f"{name}.lora_B.weight"] = b
            if use_dora:
                magnitude = rng.uniform(0.5, 2.0, linear.out_features)
                tensors[f"{name}.lora_magnitude_vector"] = magnitude
        if "lm_head" in modules:
            tensors["base_model.model.lm_head.lora_A.weight"] = rng.standard_normal((rank, 64)) / 8
            tensors["base_model.model.lm_head.lora_B.weight"] = rng.standard_normal((VOCAB, rank))
        if "embed_tokens" in modules:
            name = "base_model.model.model.embed_tokens"
            tensors[f"{name}.lora_embedding_A"] = rng.standard_normal((rank, VOCAB)) / 8
            tensors[f"{name}.lora_embedding_B"] = rng.standard_normal((64, rank)) / 2
        arrays = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        save_file(arrays, self.folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "use_dora": use_dora}
        config |= {"task_type": "CAUSAL_LM", "target_modules": list(modules)}
        if invocation_tokens:
            config["alora_invocation_tokens"] = invocation_tokens
        (self.folder / "adapter_config.json").write_text(json.dumps(config))
        return Content(self.folder.name, self.folder, rank, use_dora, invocation_tokens)
