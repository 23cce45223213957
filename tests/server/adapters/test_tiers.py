"""Host memory holds what was used last within its budget, and what somebody waits for beyond it."""

from dataclasses import dataclass

import pytest
from loraplex.adapters.tiers import HostTier


@dataclass(frozen=True)
class Packed:
    num_bytes: int


def tier(max_bytes: int, **sizes: int) -> HostTier[Packed]:
    made: HostTier[Packed] = HostTier(max_bytes)
    for version, size in sizes.items():
        made.put(version, Packed(size))
    return made


@pytest.mark.parametrize(
    ("max_bytes", "used", "wanted", "gone"),
    [
        (9, "", "", ""),
        (8, "", "", "a"),
        (6, "", "", "ab"),
        (6, "a", "", "b"),
        (6, "", "a", "b"),
        (0, "", "", "abc"),
        (0, "", "abc", ""),
        (0, "", "b", "ac"),
    ],
)
def test_the_least_recently_used_goes_first(
    max_bytes: int, used: str, wanted: str, gone: str
) -> None:
    t = tier(max_bytes, a=2, b=3, c=4)
    for version in used:
        assert t.get(version) == Packed(2)
    assert "".join(t.trim(wanted.__contains__)) == gone
    assert [version for version in "abc" if version not in t] == list(gone)
    assert t.is_over == (t.num_bytes > max_bytes)
    t.check_integrity()


def test_one_that_never_fits_does_not_drive_the_others_out() -> None:
    t = tier(5, a=2, b=3, huge=6)
    assert t.trim(lambda version: False) == ("huge",)
    assert repr(t) == "HostTier(5/5 bytes: a 2, b 3)"


def test_looking_is_no_use() -> None:
    t = tier(4, a=2, b=2)
    assert t.peek("a") == Packed(2)
    assert t.peek("c") is t.get("c") is None
    t.put("c", Packed(1))
    assert t.trim(lambda version: False) == ("a",)


def test_what_is_put_again_or_dropped_is_counted_once() -> None:
    t = tier(100, a=2)
    t.put("a", Packed(5))
    assert (len(t), t.num_bytes) == (1, 5)
    t.drop("a")
    t.drop("a")
    assert (len(t), t.num_bytes) == (0, 0)
    t.check_integrity()


def test_room_for_more() -> None:
    t = tier(5, a=2, b=3)
    assert t.has_room_beside("a")
    assert t.has_room_beside("")
    assert not t.has_room_beside("ab")
    assert t.has_room_beside("ax")
    assert not tier(0).has_room_beside("")
