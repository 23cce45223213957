"""Which of three ways an NF4 linear takes, by shape and rows: data, measured on the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from loraplex_kernels.segments import LONG_TILE_ROWS


class LinearPath(Enum):
    """How `x W^T` is computed."""

    FUSED = "fused"  # our kernel, LoRA in its epilogue; up to LONG_TILE_ROWS rows
    BITSANDBYTES = "bitsandbytes"  # its own choice between a fused kernel and a dense product
    DEQUANTIZED = "dequantized"  # once into a scratch, then a dense product


Steps = tuple[tuple[int, LinearPath], ...]
"""From so many rows on, this path; ascending by rows, from 1."""


@dataclass(frozen=True, slots=True)
class PathTable:
    """The steps of each (out_features, in_features)."""

    measured: Mapping[tuple[int, int], Steps]
    otherwise: Steps = ((1, LinearPath.BITSANDBYTES),)

    def choose(self, out_features: int, in_features: int, num_rows: int) -> LinearPath:
        steps = self.measured.get((out_features, in_features), self.otherwise)
        return [path for rows, path in steps if rows <= num_rows][-1]

    def plain(self) -> dict[str, list[tuple[int, str]]]:
        """What was measured as JSON holds it: `{"4096x14336": [[1, "fused"], [65, ...]]}`."""
        return {
            f"{out_features}x{in_features}": [(rows, path.value) for rows, path in steps]
            for (out_features, in_features), steps in self.measured.items()
        }


UNMEASURED = PathTable(MappingProxyType({}))
"""bitsandbytes everywhere: its kernels have run on many a GPU."""

EVERY_KERNEL = PathTable(
    MappingProxyType({}),
    ((1, LinearPath.FUSED), (LONG_TILE_ROWS + 1, LinearPath.DEQUANTIZED)),
)
"""Our own kernels wherever they can be, for who checks them."""
