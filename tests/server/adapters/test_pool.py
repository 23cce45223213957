"""The pool keeps what is in use or pinned, and gives up the least recently used of the rest."""

import pytest
from loraplex.adapters.pool import AdapterPool, Bind, Load, Room
from loraplex.engine.arena import Arena, Use


def pool(num_blocks: int = 10, num_slots: int = 3) -> AdapterPool:
    return AdapterPool(Arena(num_blocks), num_slots)


def load(p: AdapterPool, digest: str, num_blocks: int = 2) -> Load:
    reserved = p.reserve(digest, num_blocks)
    assert reserved is not None
    p.loaded(digest)
    return reserved


def use(p: AdapterPool, digest: str) -> None:
    p.acquire(digest)
    p.release(digest)


def with_blend(num_blocks: int = 10, num_slots: int = 4) -> AdapterPool:
    """a and b resident, and "a+b" of them, which was used last."""
    p = pool(num_blocks, num_slots)
    for digest in "ab":
        load(p, digest)
    assert p.bind("a+b", [("a", 0.5), ("b", 2.0)]) is not None
    use(p, "a+b")
    return p


def residents(p: AdapterPool, digests: str = "abcdef") -> str:
    return "".join(digest for digest in digests if p.get(digest) is not None)


def test_from_reservation_to_eviction() -> None:
    p = pool()
    reserved = p.reserve("a", 4)
    assert reserved is not None
    assert len(reserved.blocks) == 4
    assert repr(p) == f"AdapterPool(1/3: a@{reserved.slot}x0 loading)"
    assert (p.num_ready, p.is_loading, p.is_ready("a")) == (0, True, False)
    assert p.make_room(7) is None  # its weights are being written
    p.loaded("a")
    assert p.acquire("a") == reserved.slot
    assert repr(p) == f"AdapterPool(1/3: a@{reserved.slot}x1)"
    assert p.make_room(7) is None
    p.release("a")
    assert p.make_room(7) == ("a",)
    assert (p.get("a"), p.num_evicted) == (None, 1)
    assert p.arena.num_free == 10
    p.check_integrity()


def test_slots_and_blocks_are_never_shared() -> None:
    p = pool()
    loads = [load(p, digest, 3) for digest in "abc"]
    assert len({x.slot for x in loads}) == 3
    assert len({block for x in loads for block in x.blocks}) == 9
    p.check_integrity()


@pytest.mark.parametrize(
    ("num_slots", "used", "referenced", "kept", "wanted_blocks", "left"),
    [
        (4, "", "", "", 4, "abcd"),
        (4, "", "", "", 5, "bcd"),
        (4, "", "", "", 7, "cd"),
        (3, "", "", "", 1, "bcd"),  # there are blocks, but no slot
        (3, "a", "", "", 1, "acd"),  # a was used last
        (3, "", "a", "", 1, "acd"),
        (3, "", "ab", "", 5, "abd"),
        (3, "", "b", "", 8, "bd"),
        (3, "", "abc", "", 1, "abc"),
        (4, "", "abc", "", 5, "abc"),
        (4, "", "", "a", 5, "acd"),
        (4, "", "bc", "a", 5, "abc"),
        (4, "", "a", "", 9, "abc"),  # b and c together would not do, so both stay
    ],
)
def test_who_makes_room(
    num_slots: int, used: str, referenced: str, kept: str, wanted_blocks: int, left: str
) -> None:
    p = pool(10, num_slots)
    for digest in "abc":
        load(p, digest)
    for digest in used:
        use(p, digest)
    for digest in referenced:
        p.acquire(digest)
    room = p.room(kept)
    reserved = p.reserve("d", wanted_blocks, kept)
    assert (reserved is not None) == ("d" in left)
    assert (reserved is not None) == (room.blocks >= wanted_blocks and room.slots >= 1)
    assert residents(p) == left
    p.check_integrity()


def test_a_long_use_counts_from_its_end() -> None:
    p = pool()
    for digest in "abc":
        load(p, digest)
    p.acquire("a")
    use(p, "b")
    p.release("a")
    assert p.make_room(0, 3) == ("c", "b", "a")


def test_those_that_somebody_waits_for_go_last() -> None:
    p = pool()
    for digest in "abc":
        load(p, digest)
    p.awaited = {"a", "b"}
    assert p.make_room(0, 1) == ("c",)
    assert p.make_room(0, 3) == ("a", "b")


def test_a_failed_load_gives_its_room_back() -> None:
    p = pool()
    p.reserve("a", 5)
    p.drop("a")
    assert p.arena.count(Use.ADAPTER) == 0
    assert p.num_evicted == 0
    p.check_integrity()


# Blends.


def test_a_blend_is_a_slot_that_points_to_its_members() -> None:
    p = pool(10, 4)
    slots = {digest: load(p, digest).slot for digest in "ab"}
    bind = p.bind("a+b", [("a", 0.5), ("b", 2.0)])
    assert bind is not None
    assert bind == Bind(bind.slot, ((slots["a"], 0.5), (slots["b"], 2.0)))
    assert p.acquire("a+b") == bind.slot
    assert p.references() == {"a+b": 1, "a": 1, "b": 1}
    assert p.num_ready == 2
    assert (
        repr(p) == f"AdapterPool(3/4: a@{slots['a']}x1, b@{slots['b']}x1, a+b@{bind.slot}x1 (a+b))"
    )
    p.check_integrity()
    assert p.make_room(7) is None
    p.release("a+b")
    assert p.references() == {"a+b": 0, "a": 0, "b": 0}


@pytest.mark.parametrize(
    ("num_blocks", "num_slots", "used", "kept", "gone"),
    [
        (0, 1, "", "", ()),
        (0, 2, "", "", ("a+b",)),  # although it was used last
        (0, 3, "b", "", ("a+b", "a")),
        (7, 0, "", "", ("a", "a+b")),  # the blend alone would give no block
        (7, 0, "a", "", ("b", "a+b")),
        (9, 0, "", "", ("a", "a+b", "b")),
        (7, 0, "", "a", ("b", "a+b")),
        (7, 0, "", "ab", None),
        (0, 2, "", "ab", ("a+b",)),
    ],
)
def test_a_blend_goes_with_its_members_and_never_holds_them(
    num_blocks: int, num_slots: int, used: str, kept: str, gone: tuple[str, ...] | None
) -> None:
    p = with_blend()
    for digest in used:
        use(p, digest)
    assert p.make_room(num_blocks, num_slots, kept) == gone
    p.check_integrity()
    assert p.num_evicted == len(set(gone or ()) - {"a+b"})
    assert p.arena.num_free == 10 - 2 * len(residents(p))


def test_a_blend_never_takes_a_members_slot() -> None:
    p = pool(10, 2)
    for digest in "ab":
        load(p, digest)
    assert p.bind("a+b", [("a", 1.0), ("b", 1.0)]) is None
    assert p.bind("2a", [("a", 2.0)]) is not None  # in b's place
    assert residents(p) == "a"
    p.check_integrity()


# Pins.


@pytest.mark.parametrize(
    ("num_slots", "sizes", "accepted"),
    [
        (8, [5], [True]),
        (8, [6], [False]),
        (8, [2, 3], [True, True]),
        (8, [2, 4, 3], [True, False, True]),
        (4, [1, 1, 1], [True, True, False]),  # half of the slots
        (1, [1], [False]),
    ],
)
def test_pins_take_half_of_the_memory_at_most(
    num_slots: int, sizes: list[int], accepted: list[bool]
) -> None:
    p = pool(10, num_slots)
    assert [p.pin(f"v{i}", "name", size) for i, size in enumerate(sizes)] == accepted
    taken = [size for size, fits in zip(sizes, accepted, strict=True) if fits]
    assert p.pinned_room() == Room(sum(taken), len(taken))
    p.check_integrity()


def test_what_is_pinned_stays_until_its_last_owner_lets_go() -> None:
    p = pool(10, 4)
    slot = load(p, "a").slot
    assert p.pin("a", "x", 2)
    assert p.pin("a", "y", 2)
    assert p.pin("a", "y", 2)
    assert p.pin("elsewhere", "x", 3)
    assert p.missing_pins == ["elsewhere"]
    assert p.pinned_room(but=["a"]) == Room(3, 1)
    assert [p.num_blocks_of(v) for v in ("a", "elsewhere", "unknown")] == [2, 3, None]
    assert repr(p) == f"AdapterPool(1/4: a@{slot}x0 pinned, elsewher pinned, not here)"
    assert p.room(()) == Room(8, 3)
    p.unpin("a", "y")
    p.unpin("a", "nobody")
    assert p.make_room(9) is None
    p.unpin("a", "x")
    p.unpin("unknown", "x")
    assert p.make_room(9) == ("a",)
    assert p.is_pinned("elsewhere")
    assert not p.is_pinned("a")


# Versions that are gone from disk.


def test_a_forgotten_version_goes_at_once_or_with_its_last_use() -> None:
    p = with_blend()
    p.acquire("a+b")
    p.acquire("b")
    for digest in "ab":
        p.forget(digest)
    p.forget("unknown")
    assert "forgotten" in repr(p)
    p.release("a+b")
    assert residents(p) == "b"
    assert p.get("a+b") is None
    p.release("b")
    assert p.arena.num_free == 10
    load(p, "c")
    assert p.pin("c", "x", 2)
    p.forget("c")
    assert (residents(p), p.missing_pins) == ("", [])
    p.check_integrity()


def test_one_forgotten_on_its_way_goes_when_it_arrives() -> None:
    p = pool()
    p.reserve("a", 2)
    p.forget("a")
    assert residents(p) == "a"  # somebody still writes into its blocks
    p.loaded("a")
    assert p.arena.num_free == 10
    p.check_integrity()


def test_misuse_is_found_at_once() -> None:
    p = pool()
    p.reserve("a", 1)
    with pytest.raises(AssertionError, match="before it is loaded"):
        p.acquire("a")
    with pytest.raises(AssertionError, match="before its members"):
        p.bind("2a", [("a", 2.0)])
    p = pool()
    load(p, "a")
    with pytest.raises(AssertionError, match="more often"):
        p.release("a")
    p.acquire("a")
    with pytest.raises(AssertionError, match="while in use"):
        p.drop("a")
