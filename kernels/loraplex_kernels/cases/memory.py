"""Tensors with margins of NaN around them, which a stray write would change."""

import math

import torch
from torch import Tensor

from loraplex_kernels.granules import GranuleForm

MARGIN = 4096
"""Bytes before and after each tensor; a multiple of every alignment that counts."""

POISON = 0xFF
"""A byte that makes a NaN of any float type, and -1 of any integer."""


ARENA_BYTES = 2**32
"""What Triton takes an arena for that is not filled: its AMD backend looks for 2 GB at least."""


class Memory:
    """Makes the tensors of one case on one device, from one seed.

    With `fill` off nothing is written into the large ones, and "meta" is a device too: for who
    only compiles, or counts. Mutable: `_buffers`, every tensor made so far with its margins.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        fill: bool,
        form: GranuleForm = GranuleForm.ROWS,
        seed: int = 7,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.fill = fill
        self.form = form  # of adapters
        self._generator = torch.Generator(device).manual_seed(seed) if fill else None
        self._buffers: list[Tensor] = []

    def poisoned(
        self, *shape: int, dtype: torch.dtype | None = None, in_arena: bool = False
    ) -> Tensor:
        """NaN all over; `in_arena` for what in a server is a part of that far larger buffer."""
        dtype = dtype or self.dtype
        size = math.prod(shape) * dtype.itemsize
        whole = size + 2 * MARGIN
        if in_arena and not self.fill:
            whole = max(whole, ARENA_BYTES)
        buffer = torch.empty(whole, dtype=torch.uint8, device=self.device)
        if self.fill:
            buffer.fill_(POISON)
        self._buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(dtype).view(shape)

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.poisoned(*shape, dtype=dtype)
        if self.fill:
            tensor.normal_(std=std, generator=self._generator)
        return tensor

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        """fp32."""
        tensor = self.poisoned(*shape, dtype=torch.float32)
        return tensor.uniform_(low, high, generator=self._generator) if self.fill else tensor

    def codes(self, *shape: int) -> Tensor:
        """Random bytes."""
        tensor = self.poisoned(*shape, dtype=torch.uint8)
        return tensor.random_(0, 256, generator=self._generator) if self.fill else tensor

    def table(self, values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        """Host data on the device; written even where nothing is filled."""
        data = torch.tensor(values, dtype=dtype)
        tensor = self.poisoned(*data.shape, dtype=dtype)
        tensor.copy_(data)
        return tensor

    def shuffled(self, count: int) -> list[int]:
        order = torch.Generator().manual_seed(count)
        indices: list[int] = torch.randperm(count, generator=order).tolist()
        return indices

    def is_intact(self) -> bool:
        """Whether every margin is as it was made."""
        assert self.fill
        edges = [edge for b in self._buffers for edge in (b[:MARGIN], b[-MARGIN:])]
        return bool((torch.cat(edges) == POISON).all())
