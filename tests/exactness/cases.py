"""The base and the adapters whose answers are compared, each with a prompt of its own."""

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import MODULES
from loraplex_client.examples import example_adapters
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

NUM_NEW = 16
BATCH = 8
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down in his"
    " book which ships had passed before the fog came in",
    "<|im_start|>user\nTell me about the ocean and the animals that live in it, please.<|im_end|>\n"
    "<|im_start|>assistant\n",
    "Question: What is the capital of France, and which river flows through it? Give a short"
    " answer.\nAnswer:",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n    if n < 2:\n'
    "        return n\n    return",
)


def tiny_config(vocab_size: int, **changes: Any) -> LlamaConfig:
    """Two layers; more of it in `changes`."""
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.09,  # a linear neither shrinks nor amplifies
    }
    return LlamaConfig(**fields | changes)


@dataclass(frozen=True)
class Generated:
    """A PEFT adapter of random weights: `strength` is about how much of a linear's output it is."""

    dtype: torch.dtype
    strength: float = 0.15
    config: Mapping[str, Any] = field(default_factory=dict)


def of_rank(rank: int, dtype: torch.dtype, alpha: float | None = None) -> Generated:
    return Generated(dtype, config={"r": rank, "lora_alpha": alpha or 2 * rank})


def on(modules: list[str], rank: int, dtype: torch.dtype, strength: float) -> Generated:
    return Generated(dtype, strength, {"r": rank, "lora_alpha": 16, "target_modules": modules})


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
GENERATED: dict[str, Generated] = {
    "rank 1": of_rank(1, F32),
    "rank 24": of_rank(24, BF16, alpha=7.5),
    "rank 64": of_rank(64, BF16),
    "o, down": on(["o_proj", "down_proj"], 16, BF16, 0.15),
    # " the animals", in the middle of the second text, which is this case's by its place.
    "activated": Generated(
        F32, 0.3, {"r": 8, "lora_alpha": 16, "alora_invocation_tokens": [260, 2355]}
    ),
    "patterns": Generated(
        F32,
        config={
            "r": 8,
            "lora_alpha": 16,
            "rank_pattern": {"q_proj": 40, "layers.3.mlp.down_proj": 17, "up_proj": 1},
            "alpha_pattern": {"v_proj": 4, "model.layers.0.self_attn.o_proj": 48},
        },
    ),
    "patterns, rsLoRA": Generated(
        F16,
        config={
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 64, "gate_proj": 20},
            "alpha_pattern": {"down_proj": 2, "gate_proj": 30},
        },
    ),
    "some layers": Generated(
        BF16, 0.4, {"r": 16, "lora_alpha": 8, "layers_to_transform": [0, 7, 8, 29]}
    ),
    "DoRA": Generated(
        F16,
        config={
            "r": 12,
            "lora_alpha": 16,
            "use_dora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        },
    ),
    "vocabulary": on(["embed_tokens", "lm_head", "v_proj"], 8, BF16, 0.3),
}


@dataclass(frozen=True)
class Blend:
    """A weighted sum of adapters, by their names."""

    members: tuple[tuple[str, float], ...]


Adapter = str | Blend | None
"""None is the bare base."""


@dataclass(frozen=True)
class Case:
    """What is asked, and which of TEXTS."""

    name: str
    adapter: Adapter
    text: int


def all_cases() -> list[Case]:
    adapters = [*GENERATED, *(f"example {example.name}" for example in example_adapters())]
    named = [Case(name, name, index % len(TEXTS)) for index, name in enumerate(adapters, start=1)]
    return [Case("base", None, 0), *named]


def all_batches() -> list[list[Case]]:
    """Every case in some batch of 8; the base is in each."""
    base, *adapters = all_cases()
    others = BATCH - 1
    adapters += adapters[: -len(adapters) % others]
    return [[*adapters[i : i + others], base] for i in range(0, len(adapters), others)]


@contextmanager
def peft_as_it_is() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5 for a property by its former name, and warns of tied layers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def generate_adapter(generated: Generated, base: Path, folder: Path, seed: int) -> None:
    """Saved by PEFT, on a base without weights."""
    options: dict[str, Any] = {"target_modules": list(MODULES), "task_type": "CAUSAL_LM"}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    with peft_as_it_is():
        model = get_peft_model(skeleton, LoraConfig(**options | dict(generated.config)))
    draw = Draw(generated, torch.Generator().manual_seed(seed))
    checkpoint = Checkpoint(base)
    for name, module in model.base_model.model.named_modules():
        if getattr(module, "lora_A", None):
            draw.linear(module)
        if getattr(module, "lora_embedding_A", None):
            draw.embedding(module)
        if getattr(module, "lora_magnitude_vector", None):
            draw.magnitude(module, checkpoint.read(f"{name}.weight"))
    model.save_pretrained(folder, save_embedding_layers=False)


class Draw:
    """Random values for the tensors of one adapter."""

    def __init__(self, generated: Generated, generator: torch.Generator) -> None:
        self._generated = generated
        self._generator = generator

    def linear(self, module: Any) -> None:
        """Of x with elements of size 1, A x has elements of size 1, and W x of about `size`."""
        a, b = module.lora_A["default"], module.lora_B["default"]
        size = 0.04 * a.in_features**0.5
        a.weight = self._values(a.weight, a.in_features**-0.5)
        b.weight = self._values(b.weight, self._std_of_b(module, size))

    def embedding(self, module: Any) -> None:
        a, b = module.lora_embedding_A, module.lora_embedding_B
        a["default"] = self._values(a["default"], 1.0)
        b["default"] = self._values(b["default"], self._std_of_b(module, 0.1))

    def magnitude(self, module: Any, weight: Tensor) -> None:
        """Each row's norm, changed by a tenth or so."""
        layer = module.lora_magnitude_vector["default"]
        norms = weight.float().norm(dim=1)
        layer.weight = self._values(layer.weight, 0.1 * norms, norms)

    def _std_of_b(self, module: Any, size: float) -> float:
        rank, scale = module.r["default"], module.scaling["default"]
        return float(self._generated.strength * size / scale / rank**0.5)

    def _values(
        self, like: Tensor, std: float | Tensor, mean: float | Tensor = 0.0
    ) -> torch.nn.Parameter:
        values = torch.randn(like.shape, generator=self._generator) * std + mean
        return torch.nn.Parameter(values.to(self._generated.dtype), requires_grad=False)


class Folders:
    """PEFT folders by adapter name, made when they are first asked for."""

    def __init__(
        self, base: Path, work: Path, generated: Mapping[str, Generated] = GENERATED
    ) -> None:
        self.generated = generated
        self._base = base
        self._work = work
        self._examples = {f"example {e.name}": e.path for e in example_adapters()}

    def __call__(self, adapter: str) -> Path:
        folder = self._work / digest_of(adapter)
        if not folder.exists():
            if adapter in self._examples:
                shutil.copytree(self._examples[adapter], folder)
            else:
                seed = list(self.generated).index(adapter)
                generate_adapter(self.generated[adapter], self._base, folder, seed)
        return folder


def digest_of(adapter: str | Blend) -> str:
    return hashlib.sha256(str(adapter).encode()).hexdigest()
