"""Updates along the vocabulary are the dense products, however the matrices are cut."""

import pytest
import torch
from loraplex_kernels.segments import Segment
from loraplex_kernels.vocabulary import (
    CutMatrix,
    Vocabulary,
    VocabularyInput,
    VocabularyLora,
    add_to_embedding_,
    add_to_logits_,
)
from torch import Tensor

VOCAB, HIDDEN, ALIGNMENT = 53, 24, 64
RANKS, SCALES = (5, 1, 16), (0.5, -2.0, 1.25)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


class Arena:
    """Bytes that are NaN as any type until a matrix is put there, the last piece first."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.data = torch.full((1 << 15,), 0xFF, dtype=torch.uint8)
        self.dtype = dtype
        self._end = len(self.data)

    def put(self, matrix: Tensor, piece_rows: int) -> CutMatrix:
        offsets = [self._place(piece) for piece in torch.split(matrix, piece_rows)]
        rows, columns = matrix.shape
        return CutMatrix(rows, columns, piece_rows, tuple(offsets))

    def _place(self, piece: Tensor) -> int:
        raw = piece.contiguous().view(-1).view(torch.uint8)
        self._end = (self._end - len(raw)) // ALIGNMENT * ALIGNMENT - ALIGNMENT
        self.data[self._end : self._end + len(raw)] = raw
        return self._end


Dense = list[tuple[Tensor, Tensor, float]]


def updates(arena: Arena, piece_rows: int) -> tuple[tuple[VocabularyLora, ...], Dense]:
    """Three of them, packed, and as (wide [vocab, rank], narrow [rank, hidden], scale)."""
    generator = torch.Generator().manual_seed(piece_rows)
    packed, dense = [], []
    for rank, scale in zip(RANKS, SCALES, strict=True):
        wide = torch.randn(VOCAB, rank, generator=generator).to(arena.dtype)
        narrow = torch.randn(rank, HIDDEN, generator=generator).to(arena.dtype)
        dense.append((wide.float(), narrow.float(), scale))
        cut = arena.put(wide, piece_rows), arena.put(narrow, min(piece_rows, rank))
        packed.append(VocabularyLora(*cut, scale))
    return tuple(packed), dense


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("piece_rows", [1, 7, VOCAB])
def test_updates_are_the_dense_products(piece_rows: int, dtype: torch.dtype) -> None:
    """Slot 4 has one update of each kind, slot 2 a blend; other rows keep what they had."""
    arena = Arena(dtype)
    packed, dense = updates(arena, piece_rows)
    step = VocabularyInput(
        arena=arena.data,
        dtype=dtype,
        slots={4: Vocabulary(packed[:1], packed[1:2]), 2: Vocabulary(packed[1:], packed)},
        segments=(Segment(4, 1, 3), Segment(2, 4, 9)),
        logits_segments=(Segment(2, 0, 2), Segment(4, 2, 3)),
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (10,), generator=generator)
    before = torch.randn(10, HIDDEN, generator=generator)
    residual, expected = before.clone(), before.clone()
    add_to_embedding_(residual, tokens, step)
    for rows, members in ((slice(1, 3), dense[:1]), (slice(4, 9), dense[1:])):
        for wide, narrow, scale in members:
            expected[rows] += scale * wide[tokens[rows]] @ narrow
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)

    x = torch.randn(4, HIDDEN, generator=generator).to(dtype)
    before = torch.randn(4, VOCAB, generator=generator)
    logits, expected = before.clone(), before.clone()
    add_to_logits_(logits, x, step)
    for rows, members in ((slice(0, 2), dense), (slice(2, 3), dense[1:2])):
        for wide, narrow, scale in members:
            expected[rows] += scale * x[rows].float() @ narrow.T @ wide.T
    error = (logits - expected).abs().max() / expected.abs().max()
    assert float(error) < TOLERANCE[dtype]
    assert torch.equal(logits[3], before[3])
