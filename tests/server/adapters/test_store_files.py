"""Single steps on the disk."""

import os
from pathlib import Path

import pytest
from loraplex.adapters.store_files import Disk


def test_a_file_that_cannot_be_sized_is_closed(tmp_path: Path) -> None:
    def next_descriptor() -> int:
        fd = os.open(tmp_path, os.O_RDONLY)
        os.close(fd)
        return fd

    before = next_descriptor()
    with pytest.raises(OSError, match="too large"):
        Disk().open(tmp_path / "huge", (1 << 63) - 1)
    assert next_descriptor() == before
