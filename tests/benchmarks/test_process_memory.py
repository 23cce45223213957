"""What /proc says of a process, and what of a model must lie in memory."""

import os
from pathlib import Path

import pytest
from process_memory import ProcessMemory, maps, memory_of

ROLLUP = """\
55fccb2a7000-7fff99a82000 ---p 00000000 00:00 0                          [rollup]
Rss:                1692 kB
Pss:                 240 kB
Pss_Dirty:           112 kB
Pss_Anon:            112 kB
Pss_File:            120 kB
Pss_Shmem:             8 kB
Private_Dirty:       112 kB
"""
STATUS = "Name:\tcat\nState:\tR (running)\nVmHWM:\t    2048 kB\nThreads:\t1\n"


def test_memory_is_read_from_proc(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "smaps_rollup").write_text(ROLLUP)
    (folder / "status").write_text(STATUS)
    (folder / "maps").write_text("7f00-7f01 r--p 0 00:00 0    /lib/libtorch_cpu.so\n")

    found = memory_of(7, tmp_path)

    assert found == ProcessMemory(1692 * 1024, 240 * 1024, 112 * 1024, 128 * 1024, 2048 * 1024)
    assert maps(7, "libtorch", tmp_path)
    assert not maps(7, "bitsandbytes", tmp_path)
    with pytest.raises(OSError, match="smaps_rollup"):
        memory_of(8, tmp_path)


def test_of_this_process() -> None:
    found = memory_of(os.getpid())

    assert 0 < found.proportional <= found.resident <= found.peak
