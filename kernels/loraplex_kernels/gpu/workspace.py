"""Scratch memory that kernels of one step hand each other."""

import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers that are made once and reused by every layer of every step.

    Mutable: `_buffers`, and `_retired`, those that became too small: a captured graph may still
    point there. Sizes are powers of two, so that all the retired ones are smaller than the last.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._retired: list[Tensor] = []

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous and not initialised; what was there under this name is lost."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            if buffer is not None:
                self._retired.append(buffer)
            capacity = 1 << (size - 1).bit_length()
            buffer = torch.empty(capacity, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)
