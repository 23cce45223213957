"""An adapter's weights as the arena holds them: granules of 16 ranks, laid into equal blocks.

Per layer and module, A `[16, in]` and B^T `[16, out]` of each 16 ranks, the last ones padded with
zero rows, each starting on 64 bytes and none crossing a block's edge. Packed once; loading is a
copy a block. The packed file is a cache: the uploaded safetensors and config stay the truth.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loraplex_kernels.tables import GRANULE_RANK, Granule
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.peft import AdapterModule, AdapterSpec
from loraplex.errors import AdapterInvalidError
from loraplex.model.config import MODULES

FORMAT = 1
ALIGNMENT = 64  # bytes; a cache line, and what 128-bit loads need


@dataclass(frozen=True, slots=True)
class Layout:
    """What the packed bytes depend on beside the adapter itself."""

    block_bytes: int
    dtype: torch.dtype

    @property
    def fingerprint(self) -> str:
        text = f"{FORMAT} {GRANULE_RANK} {ALIGNMENT} {self.block_bytes} {self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`data` uint8 [num_blocks, block_bytes]; the granules' offsets count from its start."""

    data: Tensor
    granules: tuple[Granule, ...]

    @property
    def num_blocks(self) -> int:
        return int(self.data.shape[0])

    @property
    def num_parts(self) -> int:
        """Granules of the module with the largest rank."""
        return 1 + max(granule.part for granule in self.granules)

    def placed(self, blocks: Sequence[int]) -> list[Granule]:
        """The granules with their offsets in the arena, where block i of `data` is blocks[i]."""
        size = int(self.data.shape[1])

        def arena_offset(offset: int) -> int:
            return blocks[offset // size] * size + offset % size

        return [g._replace(a=arena_offset(g.a), b=arena_offset(g.b)) for g in self.granules]


def pack(weights: Path, spec: AdapterSpec, layout: Layout) -> PackedAdapter:
    """Lay out a validated safetensors file; at most one matrix is unpacked at a time."""
    pieces = [
        (module, part) for module in spec.modules for part in range(-(-module.rank // GRANULE_RANK))
    ]
    sizes = [
        GRANULE_RANK * features * layout.dtype.itemsize
        for module, _ in pieces
        for features in (module.base.in_features, module.base.out_features)
    ]
    offsets, num_blocks = place(sizes, layout.block_bytes)
    data = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
    granules = []
    with safe_open(weights, framework="pt") as file:
        for index, (module, part) in enumerate(pieces):
            a, b = offsets[2 * index], offsets[2 * index + 1]
            _write(data, a, _read(file, module.a.tensor, layout.dtype), part)
            _write(data, b, _read(file, module.b.tensor, layout.dtype).T, part)
            granules.append(_granule(module, part, a, b))
    return PackedAdapter(data, tuple(granules))


def place(sizes: Sequence[int], block_bytes: int) -> tuple[list[int], int]:
    """Offsets for pieces of these sizes, none across a block's edge, and the number of blocks.

    First fit, largest first: what is left of a block is less than the smallest piece that follows.
    """
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    assert max(rounded) <= block_bytes, "a granule is larger than a block"
    offsets = [0] * len(sizes)
    used: list[int] = []
    first_open = 0
    smallest = min(rounded)
    for index in sorted(range(len(sizes)), key=lambda i: -rounded[i]):
        block = first_open
        while block < len(used) and used[block] + rounded[index] > block_bytes:
            block += 1
        if block == len(used):
            used.append(0)
        offsets[index] = block * block_bytes + used[block]
        used[block] += rounded[index]
        while first_open < len(used) and used[first_open] + smallest > block_bytes:
            first_open += 1
    return offsets, len(used)


def _read(file: Any, name: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = file.get_tensor(name).to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        short = str(dtype).removeprefix("torch.")
        raise AdapterInvalidError(name, f"holds values that {short} cannot hold")
    return tensor


def _write(data: Tensor, offset: int, matrix: Tensor, part: int) -> None:
    """16 rows of `matrix [rank, features]`, from rank 16 * part on, at a byte offset."""
    rows = matrix[part * GRANULE_RANK : (part + 1) * GRANULE_RANK].contiguous()
    raw = rows.view(-1).view(torch.uint8)
    data.view(-1)[offset : offset + raw.numel()] = raw


def _granule(module: AdapterModule, part: int, a: int, b: int) -> Granule:
    return Granule(module.base.layer, MODULES.index(module.base.module), part, a, b, module.scale)


def save_packed(packed: PackedAdapter, path: Path) -> None:
    """Write the cache file; not atomic, so give it a temporary place first."""
    index = torch.tensor([g[:5] for g in packed.granules], dtype=torch.int64)
    scale = torch.tensor([g.scale for g in packed.granules], dtype=torch.float64)
    save_file({"data": packed.data, "granules": index, "scale": scale}, path)


def open_packed(path: Path) -> PackedAdapter:
    """The cache file, its weights mapped rather than read."""
    with safe_open(path, framework="pt") as file:
        index, scales = file.get_tensor("granules").tolist(), file.get_tensor("scale").tolist()
        granules = tuple(
            Granule(layer, module, part, a, b, scale)
            for (layer, module, part, a, b), scale in zip(index, scales, strict=True)
        )
        return PackedAdapter(file.get_tensor("data"), granules)
