"""What the model runs on, and how much room is there."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.errors import StartupError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
INTERPRETER = "triton-interpret"
# By device; the first is the default.
DTYPES_OF = {
    "cpu": ("bfloat16", "float32"),
    "cuda": ("bfloat16",),
    INTERPRETER: ("float16", "float32", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class Device:
    """`name` is cpu, cuda or triton-interpret: the CUDA path, run in Python on CPU tensors."""

    name: str
    where: torch.device
    dtype: torch.dtype  # of activations, KV and adapters


def choose_device(name: str, dtype: str | None) -> Device:
    """StartupError when it is not there, or does not compute in this type."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in DTYPES_OF:
        raise StartupError(f"--device {name} is not served (auto, {', '.join(DTYPES_OF)})")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device on this machine")
    allowed = DTYPES_OF[name]
    chosen = dtype or allowed[0]
    if chosen not in allowed:
        raise StartupError(f"--device {name} computes in {' or '.join(allowed)}, not in {chosen}")
    return Device(name, torch.device("cuda" if name == "cuda" else "cpu"), DTYPES[chosen])


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_memory()


def free_host_memory() -> int:
    """Bytes that can be taken without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
