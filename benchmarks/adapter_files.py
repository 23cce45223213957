"""Random adapters as ordinary PEFT folders: what they say is noise, what they cost is real."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from loraplex.model.config import MODULES, LinearShape
from safetensors.torch import save_file


def write_adapter(folder: Path, linears: Iterable[LinearShape], rank: int, seed: int) -> None:
    """LoRA on every linear, in bf16. B is small, not zero; the same seed gives the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for linear in linears:
        a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * 0.01
        name = f"base_model.model.{linear.name}"
        tensors[f"{name}.lora_A.weight"] = a.to(torch.bfloat16)
        tensors[f"{name}.lora_B.weight"] = b.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(MODULES),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
