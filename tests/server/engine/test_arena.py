"""The arena hands out each block once, and all or nothing."""

import pytest
from loraplex.engine.arena import Arena, Use


def test_blocks_are_handed_out_and_taken_back() -> None:
    arena = Arena(6)
    kv = arena.allocate(2, Use.KV)
    adapter = arena.allocate(3, Use.ADAPTER)
    assert kv is not None
    assert adapter is not None
    assert len({*kv, *adapter}) == 5
    assert repr(arena) == "Arena(6 blocks: 2 kv, 3 adapter, 1 free)"
    arena.free(kv)
    assert (arena.num_free, arena.count(Use.KV), arena.count(Use.ADAPTER)) == (3, 0, 3)
    arena.free(adapter)
    assert sorted(arena.allocate(6, Use.KV) or []) == list(range(6))
    arena.check_integrity()


@pytest.mark.parametrize(("taken", "asked"), [(0, 5), (4, 1), (3, 2)])
def test_too_many_changes_nothing(taken: int, asked: int) -> None:
    arena = Arena(4)
    arena.allocate(taken, Use.KV)
    before = repr(arena)
    assert arena.allocate(asked, Use.ADAPTER) is None
    assert repr(arena) == before
    arena.check_integrity()


def test_a_block_may_turn_to_another_use() -> None:
    arena = Arena(3)
    blocks = arena.allocate(2, Use.KV)
    assert blocks is not None
    arena.turn(blocks[0], Use.CACHED)
    assert [arena.use_of(block) for block in blocks] == [Use.CACHED, Use.KV]
    assert repr(arena) == "Arena(3 blocks: 1 kv, 1 cached, 0 adapter, 1 free)"
    arena.check_integrity()
    arena.free(blocks)
    assert (arena.count(Use.KV), arena.count(Use.CACHED), arena.use_of(blocks[0])) == (0, 0, None)
    arena.check_integrity()


def test_a_block_cannot_be_freed_twice() -> None:
    arena = Arena(2)
    blocks = arena.allocate(1, Use.KV)
    assert blocks is not None
    arena.free(blocks)
    with pytest.raises(KeyError):
        arena.free(blocks)
    arena.check_integrity()
