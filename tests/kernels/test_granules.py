"""Both forms of a granule: what is written comes back, and operands lie as the tiles take them."""

import pytest
import torch
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from torch import Tensor

from tests.kernels.inputs import poison

OFFSET = 64


def numbered(ranks: int, features: int) -> Tensor:
    return torch.arange(1.0, ranks * features + 1).view(ranks, features)


@pytest.mark.parametrize("form", GranuleForm)
@pytest.mark.parametrize(("ranks", "features"), [(16, 64), (3, 40), (1, 7)])
def test_what_is_written_comes_back(form: GranuleForm, ranks: int, features: int) -> None:
    matrix = numbered(ranks, features)
    size = form.num_bytes(features, matrix.dtype)
    for write, read in ((form.write_a, form.read_a), (form.write_b, form.read_b)):
        arena = poison(OFFSET + size + 64)
        write(arena, OFFSET, matrix)
        back = read(arena, OFFSET, features, matrix.dtype)
        assert torch.equal(back[:ranks], matrix)
        assert back.shape == (GRANULE_RANK, features)
        assert not back[ranks:].any()
        inside = arena[OFFSET : OFFSET + size].view(matrix.dtype)
        assert int(inside.count_nonzero()) == matrix.numel()  # zeros fill it up
        assert (arena[:OFFSET] == 0xFF).all()
        assert (arena[OFFSET + size :] == 0xFF).all()


def test_operands_lie_tile_after_tile() -> None:
    form, matrix = GranuleForm.OPERANDS, numbered(16, 64)
    arena = poison(form.num_bytes(64, matrix.dtype))
    form.write_a(arena, 0, matrix)
    tiles = arena.view(matrix.dtype).view(2, 16, 2, 16)
    assert torch.equal(tiles[0, :, 0], matrix[:, 0::4])
    assert torch.equal(tiles[1, :, 1], matrix[:, 3::4])
    form.write_b(arena, 0, matrix)
    pieces = arena.view(matrix.dtype).view(4, 8, 16, 2)
    assert torch.equal(pieces[3, 5, 2], matrix[10:12, 3 * 16 + 2])
