"""Random adapters as ordinary PEFT folders: what they say is noise, what they cost is real."""

import json
import os
import random
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from loraplex.adapters.peft import CONFIG_NAME
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.model.config import LinearShape, read_model_config
from safetensors.torch import save_file
from torch import Tensor

_NOISE = 1 << 22
"""Elements of the one stretch of noise that all matrices are cut from: thousands take no time."""

_VARIED_BYTES = 8


def write_adapter(folder: Path, linears: Iterable[LinearShape], rank: int, seed: int) -> None:
    """LoRA on these linears, in bf16. B is small, not zero; the same seed gives the same bytes."""
    rng = random.Random(seed)
    tensors: dict[str, Tensor] = {}
    modules = set()
    for linear in linears:
        name = f"base_model.model.{linear.name}"
        a = _matrix(rank, linear.in_features, rng) * linear.in_features**-0.5
        b = _matrix(linear.out_features, rank, rng) * 0.01
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        modules.add(linear.module)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def write_variant(folder: Path, of: Path, number: int) -> None:
    """A copy, on disk when this returns, that differs in a few weights: new content to a server."""
    folder.mkdir(parents=True)
    shutil.copyfile(of / CONFIG_NAME, folder / CONFIG_NAME)
    shutil.copyfile(of / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    with (folder / WEIGHTS_NAME).open("r+b") as file:
        file.seek(-_VARIED_BYTES, os.SEEK_END)
        # Bytes under 0x40 are finite numbers, whatever the element type.
        file.write(bytes(number >> 6 * place & 0x3F for place in range(_VARIED_BYTES)))
        os.fsync(file.fileno())


def _matrix(rows: int, columns: int, rng: random.Random) -> Tensor:
    """bf16 [rows, columns] of unit variance, from a random place of the noise."""
    size = rows * columns
    start = rng.randrange(max(1, _NOISE - size))
    noise = _noise().repeat(-(-size // _NOISE)) if size > _NOISE else _noise()
    return noise[start : start + size].view(rows, columns)


@cache
def _noise() -> Tensor:
    return torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def weights_bytes(folder: Path) -> int:
    return (folder / WEIGHTS_NAME).stat().st_size


def linears_of(model: Path) -> list[LinearShape]:
    """All that an adapter may adapt."""
    return list(read_model_config(model).linears())
