"""How a granule's A and B lie in the arena, and copies into and out of it."""

from enum import Enum

import torch.nn.functional as F
from torch import Tensor, dtype

GRANULE_RANK = 16
"""Ranks are stored and computed 16 at a time; the last granule of a matrix is padded with zeros."""

_BLOCK = 64
"""Features that operands come in: two tiles of A or of B."""


class GranuleForm(Enum):
    """The order of A [16, K] and B^T [16, N]; which one, the ops say (`Ops.granule_form`).

    ROWS      row-major
    OPERANDS  as a processor's matrix tiles take them, 1024 bytes of bf16 after 1024, each feature
              count rounded up to 64 with zeros: A [K / 64, 2, rank, 2, 16], where [b, t, r, h, i]
              is input 64 b + 4 i + 2 t + h, as 4-bit codes come when they are unpacked in words of
              four; B [N / 16, rank / 2, 16, 2], the right operand of TDPBF16PS (Intel's
              instruction set reference)
    """

    ROWS = "rows"
    OPERANDS = "operands"

    def num_bytes(self, features: int, weight_dtype: dtype) -> int:
        """Of A with so many inputs, or of B with so many outputs."""
        return GRANULE_RANK * self._padded(features) * weight_dtype.itemsize

    def write_a(self, arena: Tensor, offset: int, a: Tensor) -> None:
        """`a` [up to 16, K], in the type that the arena has, to byte `offset`."""
        _write(self._a(self._piece(arena, offset, a.shape[1], a.dtype)), a)

    def write_b(self, arena: Tensor, offset: int, b: Tensor) -> None:
        """`b` is B^T [up to 16, N]."""
        _write(self._b(self._piece(arena, offset, b.shape[1], b.dtype)), b)

    def read_a(self, arena: Tensor, offset: int, features: int, weight_dtype: dtype) -> Tensor:
        """A [16, features]."""
        return _read(self._a(self._piece(arena, offset, features, weight_dtype)), features)

    def read_b(self, arena: Tensor, offset: int, features: int, weight_dtype: dtype) -> Tensor:
        """B^T [16, features]."""
        return _read(self._b(self._piece(arena, offset, features, weight_dtype)), features)

    def _padded(self, features: int) -> int:
        return features if self is GranuleForm.ROWS else -(-features // _BLOCK) * _BLOCK

    def _piece(self, arena: Tensor, offset: int, features: int, weight_dtype: dtype) -> Tensor:
        end = offset + self.num_bytes(features, weight_dtype)
        return arena[offset:end].view(weight_dtype)

    def _a(self, piece: Tensor) -> Tensor:
        """A view [16, ...] whose further dimensions count the inputs."""
        if self is GranuleForm.ROWS:
            return piece.view(GRANULE_RANK, -1)
        return piece.view(-1, 2, GRANULE_RANK, 2, _BLOCK // 4).permute(2, 0, 4, 1, 3)

    def _b(self, piece: Tensor) -> Tensor:
        """A view [16, ...] or, in pairs, [8, 2, ...]."""
        if self is GranuleForm.ROWS:
            return piece.view(GRANULE_RANK, -1)
        return piece.view(-1, GRANULE_RANK // 2, 16, 2).permute(1, 3, 0, 2)


def _write(there: Tensor, matrix: Tensor) -> None:
    missing = there.numel() // GRANULE_RANK - matrix.shape[1], GRANULE_RANK - matrix.shape[0]
    there.copy_(F.pad(matrix, (0, missing[0], 0, missing[1])).reshape(there.shape))


def _read(there: Tensor, features: int) -> Tensor:
    return there.reshape(GRANULE_RANK, -1)[:, :features]
