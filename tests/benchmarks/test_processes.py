"""Memory and CPU time of a process and its descendants, from a made-up /proc."""

import os
from pathlib import Path

import pytest
from processes import Memory, cpu_seconds, memory, tree


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    def process(pid: int, parent: int, state: str = "S") -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        fields = [state, str(parent), *["0"] * 9, "150", "50", *["0"] * 20]
        (folder / "stat").write_text(f"{pid} (a (b) c) {' '.join(fields)}\n")
        (folder / "smaps_rollup").write_text(
            "Rss: 9 kB\nPss: 2000 kB\nPss_Anon: 7 kB\nPss_File: 3 kB\nPss_Shmem: 0 kB\n"
        )
        (folder / "status").write_text("Name: x\nVmHWM:\t    3000 kB\n")

    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        process(pid, parent)
    process(13, 10, state="Z")
    (tmp_path / "version").write_text("Linux")
    return tmp_path


def test_a_tree_has_children_of_children_but_none_that_have_ended(proc: Path) -> None:
    assert tree(10, proc) == [10, 11, 12]
    assert tree(13, proc) == []
    assert tree(99, proc) == []


def test_memory_and_time_add_up(proc: Path) -> None:
    assert memory([10, 11, 99], proc) == Memory(pss=4.096, peak=6.144)
    assert cpu_seconds([10, 11, 99], proc) == pytest.approx(400 / os.sysconf("SC_CLK_TCK"))
