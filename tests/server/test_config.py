"""Settings as a user writes them."""

from pathlib import Path

import pytest
from loraplex.config import (
    Address,
    cache_dir,
    data_dir,
    format_size,
    parse_address,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:50051", Address("127.0.0.1", 50051)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:80", Address("::1", 80)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "localhost", ":80", "::1:80", "host:99999", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("512M", 512 << 20),
        ("2g", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("1 TB", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "lots", "1X", "1.2.3G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2 << 30, "2.0 GiB"), (202 << 20, "202 MiB")],
)
def test_sizes_for_a_person(size: int, expected: str) -> None:
    assert format_size(size) == expected


def test_folders_follow_xdg_and_ignore_relative_ones() -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/loraplex")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/loraplex"
    assert data_dir({"XDG_DATA_HOME": "/d"}) == Path("/d/loraplex")
    assert data_dir({}) == Path.home() / ".local/share/loraplex"
