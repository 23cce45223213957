"""Host memory in large pages.

Weights are streamed through once a step; with pages of 4 KB, looking pages up takes a good part.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # of Linux
_ALIGNMENT = 64


def prefer_large_pages(tensor: Tensor) -> None:
    """Of host memory not written yet; without effect where the system has no such pages."""
    if tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    size = tensor.data_ptr() + tensor.nbytes - first
    if size >= _LARGE_PAGE and _madvise() is not None:
        _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None


class Shelf:
    """Tensors beside each other in large pages. Mutable: `_chunk`, and how much of it is used."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of a host tensor, contiguous."""
        size = tensor.nbytes
        if self._used + size > len(self._chunk):
            self._chunk = torch.empty(max(size, CHUNK_BYTES), dtype=torch.uint8)
            prefer_large_pages(self._chunk)
            self._used = 0
        place = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor)
