"""LoRA on embed_tokens and lm_head, in plain torch on any device.

The matrix along the vocabulary is far larger than a block, so it lies in pieces of whole rows.
Few adapters have one: the steps without such rows never come here, and those with some allocate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_kernels.segments import Segment
from loraplex_kernels.tables import view


class CutMatrix(NamedTuple):
    """A row-major `[rows, columns]` in the arena, `piece_rows` rows at each offset in turn."""

    rows: int
    columns: int
    piece_rows: int  # the last piece holds the rest
    offsets: tuple[int, ...]  # bytes from the arena's start


class VocabularyLora(NamedTuple):
    """scale * B A of one adapter, where one of the two matrices runs along the vocabulary."""

    wide: CutMatrix  # [vocab, rank]: A^T of embed_tokens, B of lm_head
    narrow: CutMatrix  # [rank, hidden]: B^T of embed_tokens, A of lm_head
    scale: float


class Vocabulary(NamedTuple):
    """What a slot adds to the embedding and to the logits; a blend lists its members' updates."""

    embedding: tuple[VocabularyLora, ...] = ()
    head: tuple[VocabularyLora, ...] = ()


@dataclass(frozen=True, slots=True)
class VocabularyInput:
    """A step's rows whose adapters reach into the vocabulary; built by the batch, on the host."""

    arena: Tensor  # uint8 [arena bytes]
    dtype: torch.dtype  # of the adapters' weights in the arena
    slots: Mapping[int, Vocabulary]
    segments: tuple[Segment, ...]  # over the step's rows
    logits_segments: tuple[Segment, ...]  # over the rows whose logits are wanted


def add_to_embedding_(residual: Tensor, token_ids: Tensor, rows: VocabularyInput) -> None:
    """`residual[t] += scale * A^T[token_ids[t]] B^T` for every row of `rows.segments`.

    residual fp32 [T, hidden]; token_ids int64 [T]. Computed in fp32.
    """
    for slot, lo, hi in rows.segments:
        for lora in rows.slots[slot].embedding:
            picked = _gather(rows, lora.wide, token_ids[lo:hi])
            residual[lo:hi] += (picked.float() * lora.scale) @ _whole(rows, lora.narrow).float()


def add_to_logits_(logits: Tensor, x: Tensor, rows: VocabularyInput) -> None:
    """`logits[t] += scale * B (A x[t])` for every row of `rows.logits_segments`.

    logits fp32 [L, vocab]; x [L, hidden], what lm_head reads. Both products in the weights' type,
    what is between them scaled in fp32.
    """
    for slot, lo, hi in rows.logits_segments:
        for lora in rows.slots[slot].head:
            v = (x[lo:hi].to(rows.dtype) @ _whole(rows, lora.narrow).T).float() * lora.scale
            v = v.to(rows.dtype)
            for first, piece in _pieces(rows, lora.wide):
                logits[lo:hi, first : first + len(piece)] += v @ piece.T


def _gather(rows: VocabularyInput, matrix: CutMatrix, indices: Tensor) -> Tensor:
    """Some rows of a matrix, as [len(indices), columns]."""
    elements = rows.arena.view(rows.dtype)
    starts = torch.tensor(matrix.offsets, device=indices.device) // rows.dtype.itemsize
    piece, row = indices // matrix.piece_rows, indices % matrix.piece_rows
    columns = torch.arange(matrix.columns, device=indices.device)
    return elements[(starts[piece] + row * matrix.columns)[:, None] + columns]


def _pieces(rows: VocabularyInput, matrix: CutMatrix) -> list[tuple[int, Tensor]]:
    """(first row, [rows of it, columns]) of each piece."""
    firsts = range(0, matrix.rows, matrix.piece_rows)
    sizes = [min(matrix.piece_rows, matrix.rows - first) for first in firsts]
    return [
        (first, view(rows.arena, offset, size, matrix.columns, rows.dtype))
        for first, size, offset in zip(firsts, sizes, matrix.offsets, strict=True)
    ]


def _whole(rows: VocabularyInput, matrix: CutMatrix) -> Tensor:
    pieces = [piece for _, piece in _pieces(rows, matrix)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
