"""Codes are kept for the next start, and made anew where they cannot be read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loraplex.model import nf4
from loraplex.model.nf4_cache import NF4Cache
from loraplex_kernels.nf4 import NF4Weight

IDENTITY = "0" * 64


def make(seed: int = 0) -> NF4Weight:
    return nf4.quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)))


def not_again() -> NF4Weight:
    raise AssertionError("what was kept is made again")


def same(one: NF4Weight, other: NF4Weight) -> bool:
    parts = ("codes", "absmax", "code")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_a_second_start_makes_nothing(tmp_path: Path) -> None:
    first = NF4Cache(tmp_path / "nf4", IDENTITY)
    made = [first.weight("a", make), first.weight("b", lambda: make(1))]
    first.save()
    second = NF4Cache(tmp_path / "nf4", IDENTITY)
    kept = [second.weight(name, not_again) for name in "ab"]
    assert all(map(same, made, kept))
    second.save()
    files = sorted(path.suffix for path in (tmp_path / "nf4").iterdir())
    assert files == [".safetensors", ".sha256"]


def test_another_base_has_its_own(tmp_path: Path) -> None:
    cache = NF4Cache(tmp_path, IDENTITY)
    cache.weight("a", make)
    cache.save()
    other = NF4Cache(tmp_path, "1" * 64).weight("a", lambda: make(1))
    assert same(other, make(1))


def flip(data: bytearray) -> None:
    data[-1] ^= 1


@pytest.mark.parametrize("damage", [flip, bytearray.clear], ids=["one bit", "all of it"])
def test_a_damaged_file_is_made_anew(
    damage: Callable[[bytearray], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = NF4Cache(tmp_path, IDENTITY)
    cache.weight("a", make)
    cache.save()
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    again = NF4Cache(tmp_path, IDENTITY)
    assert "its bytes have changed" in caplog.text
    assert same(again.weight("a", make), make())
    again.save()
    assert same(NF4Cache(tmp_path, IDENTITY).weight("a", not_again), make())


def test_a_disk_that_cannot_keep_them_is_no_reason_not_to_serve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nf4").write_text("a file in the folder's place")
    cache = NF4Cache(tmp_path / "nf4", IDENTITY)
    assert same(cache.weight("a", make), make())
    cache.save()
    assert "not kept for the next start" in caplog.text
