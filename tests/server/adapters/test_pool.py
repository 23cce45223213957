"""The pool keeps what is in use, and gives up the least recently used of the rest."""

import pytest
from loraplex.adapters.pool import AdapterPool, Load
from loraplex.engine.arena import Arena, Use


def pool(num_blocks: int = 10, num_slots: int = 3) -> AdapterPool:
    return AdapterPool(Arena(num_blocks), num_slots)


def load(p: AdapterPool, digest: str, num_blocks: int = 2) -> Load:
    reserved = p.reserve(digest, num_blocks)
    assert reserved is not None
    p.loaded(digest)
    return reserved


def residents(p: AdapterPool, digests: str = "abcdef") -> str:
    return "".join(digest for digest in digests if p.get(digest) is not None)


def test_from_reservation_to_eviction() -> None:
    p = pool()
    reserved = p.reserve("a", 4)
    assert reserved is not None
    assert len(reserved.blocks) == 4
    assert repr(p) == f"AdapterPool(1/3: a@{reserved.slot}x0 loading)"
    assert p.num_ready == 0
    assert not p.evict_idle()  # its weights are being written
    p.loaded("a")
    assert p.acquire("a") == reserved.slot
    assert repr(p) == f"AdapterPool(1/3: a@{reserved.slot}x1)"
    assert not p.evict_idle()
    p.release("a")
    assert p.evict_idle()
    assert p.get("a") is None
    assert p.arena.num_free == 10
    p.check_integrity()


def test_slots_and_blocks_are_never_shared() -> None:
    p = pool()
    loads = [load(p, digest, 3) for digest in "abc"]
    assert len({x.slot for x in loads}) == 3
    assert len({block for x in loads for block in x.blocks}) == 9
    p.check_integrity()


@pytest.mark.parametrize(
    ("num_slots", "used", "referenced", "wanted_blocks", "left"),
    [
        (4, "", "", 4, "abcd"),
        (4, "", "", 5, "bcd"),
        (4, "", "", 7, "cd"),
        (3, "", "", 1, "bcd"),  # there are blocks, but no slot
        (3, "a", "", 1, "acd"),  # a was used last
        (3, "", "a", 1, "acd"),
        (3, "", "ab", 5, "abd"),
        (3, "", "b", 8, "bd"),
        (3, "", "abc", 1, "abc"),
        (4, "", "abc", 5, "abc"),
    ],
)
def test_who_makes_room(
    num_slots: int, used: str, referenced: str, wanted_blocks: int, left: str
) -> None:
    p = pool(10, num_slots)
    for digest in "abc":
        load(p, digest)
    for digest in used:
        p.acquire(digest)
        p.release(digest)
    for digest in referenced:
        p.acquire(digest)
    reserved = p.reserve("d", wanted_blocks)
    assert (reserved is not None) == ("d" in left)
    assert residents(p) == left
    p.check_integrity()


def test_a_failed_load_gives_its_room_back() -> None:
    p = pool()
    p.reserve("a", 5)
    p.drop("a")
    assert p.arena.count(Use.ADAPTER) == 0
    p.check_integrity()


def test_misuse_is_found_at_once() -> None:
    p = pool()
    p.reserve("a", 1)
    with pytest.raises(AssertionError, match="before it is loaded"):
        p.acquire("a")
    p = pool()
    load(p, "a")
    with pytest.raises(AssertionError, match="more often"):
        p.release("a")
    p.acquire("a")
    with pytest.raises(AssertionError, match="while in use"):
        p.drop("a")
