"""The adapter tables hold what was written last, a slot at a time."""

import pytest
import torch
from loraplex_kernels.granules import GRANULE_RANK
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale, view


def tables(num_slots: int = 3, max_rank: int = 40) -> AdapterTables:
    return AdapterTables(num_slots, 2, 4, max_rank, torch.device("cpu"))


@pytest.mark.parametrize(("max_rank", "granules"), [(1, 1), (16, 1), (17, 2), (64, 4)])
def test_room_for_the_largest_rank(max_rank: int, granules: int) -> None:
    assert tables(max_rank=max_rank).scale.shape == (3, 2, 4, granules)
    assert tables(max_rank=max_rank).offset.shape == (3, 2, 4, granules, 2)


def test_write_tells_every_granule_and_leaves_other_slots_alone() -> None:
    t = tables()
    other = [Granule(1, 3, 0, 8, 9, 1.0)]
    t.write(2, other)
    t.write(
        1,
        [
            Granule(0, 0, 1, 300, 400, 0.25),  # in any order
            Granule(0, 0, 0, 100, 200, 0.5),
            Granule(1, 3, 0, 1 << 40, (1 << 40) + 64, 2.0),
        ],
    )
    assert t.granules(1, 0, 0) == [(100, 200, 0.5), (300, 400, 0.25)]
    assert t.granules(1, 1, 3) == [(1 << 40, (1 << 40) + 64, 2.0)]
    assert t.granules(1, 0, 3) == t.granules(1, 1, 0) == t.granules(0, 0, 0) == []
    assert t.granules(2, 1, 3) == [(8, 9, 1.0)]


def test_a_slot_forgets_its_last_adapter() -> None:
    t = tables()
    t.write(0, [Granule(0, m, p, 64, 128, 1.0) for m in range(4) for p in range(3)])
    t.write(0, [Granule(1, 2, 0, 192, 256, 3.0)])
    assert t.granules(0, 1, 2) == [(192, 256, 3.0)]
    assert int(t.num_granules.sum()) == 1
    t.write(0, [])
    assert int(t.num_granules.sum()) == 0


def test_output_scales_come_and_go_with_their_adapter() -> None:
    t = tables()
    granules = [Granule(0, 0, 0, 64, 128, 1.0)]
    t.write(2, granules, [OutputScale(0, 0, 0)])
    t.write(1, granules, [OutputScale(1, 3, 1 << 40), OutputScale(0, 2, 192)])
    assert t.scaled_slots == {1, 2}
    assert t.output_scale[1].tolist() == [[-1, -1, 192, -1], [-1, -1, -1, 1 << 40]]
    t.write(1, granules, [OutputScale(1, 1, 64)])
    assert t.output_scale[1].tolist() == [[-1] * 4, [-1, 64, -1, -1]]
    t.write(1, granules)
    assert t.scaled_slots == {2}
    assert (t.output_scale >= 0).nonzero().tolist() == [[2, 0, 0]]


def test_view_is_the_arenas_own_bytes() -> None:
    arena = torch.zeros(4096, dtype=torch.uint8)
    matrix = view(arena, 64, GRANULE_RANK, 5, torch.bfloat16)
    matrix[1, 0] = 1.0
    assert matrix.shape == (GRANULE_RANK, 5)
    assert arena.view(torch.bfloat16)[32 + 5] == 1.0
    assert int((arena != 0).sum()) == 2
