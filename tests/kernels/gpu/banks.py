"""What the LoRA kernels' tests add to `tests.kernels.inputs`: tiles, poison, recorded launches."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from loraplex_kernels.gpu.launch import Grid, launch_now
from loraplex_kernels.gpu.workspace import Workspace
from loraplex_kernels.ops import LoraInput, LoraTiles
from loraplex_kernels.segments import Segment, pad_tiles, tiles_of
from torch import Tensor

from tests.kernels.inputs import CPU, Bank


class PoisonedWorkspace(Workspace):
    """Hands out NaN, so that an entry that was not written shows when it is read."""

    def __init__(self, poison: float = torch.nan) -> None:
        super().__init__(CPU)
        self._poison = poison

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return super().take(name, shape, dtype).fill_(self._poison)


@dataclass(frozen=True)
class Framed:
    """A matrix with NaN on all sides in memory, its rows not contiguous."""

    whole: Tensor
    inner: Tensor

    def is_intact(self) -> bool:
        around = self.whole.clone()
        around[2:-2, 3:-5] = torch.nan
        return bool(around.isnan().all())


def framed(matrix: Tensor) -> Framed:
    rows, columns = matrix.shape
    whole = torch.full((rows + 4, columns + 8), torch.nan, dtype=matrix.dtype)
    inner = whole[2:-2, 3:-5]
    inner.copy_(matrix)
    return Framed(whole, inner)


def with_tiles(bank: Bank, slots: list[int], spare: int = 0) -> LoraInput:
    """The step's input for these rows, `spare` entries of padding in both tile lists."""
    lora = bank.lora_input(slots)
    tiles = tiles_of(lora.segments, len(slots))
    short, long = (_table(pad_tiles(part, len(part) + spare)) for part in (tiles.short, tiles.long))
    starts = torch.tensor(tiles.starts, dtype=torch.int32)
    return replace(lora, tiles=LoraTiles(short, starts, long))


def _table(tiles: list[Segment]) -> Tensor:
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3)


class Recorder:
    """A launch that only remembers, as capture does. Mutable: `_calls`."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Grid, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
        self._calls.append((kernel, grid, args, meta))

    def replay(self) -> None:
        for kernel, grid, args, meta in self._calls:
            launch_now(kernel, grid, *args, **meta)

    @property
    def arguments(self) -> list[Any]:
        """All that a launch is made of but the tensors' contents and places."""
        return [
            (kernel, grid, [_form(arg) for arg in args], meta)
            for kernel, grid, args, meta in self._calls
        ]


def _form(arg: Any) -> Any:
    return (arg.dtype, arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg
