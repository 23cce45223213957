"""What a system's processes take: memory, and time of the CPU while nobody asks them anything."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from process_memory import PROC, memory_of

IDLE = 0.1
"""Of one core: what a process may use and still count as idle."""

_SECONDS_TO_LOOK = 0.2


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a process and its descendants, in MB (10^6 bytes)."""

    pss: float  # resident; a page that several processes share counts in parts
    peak: float  # the largest resident size of each, added up


def tree(pid: int, proc: Path = PROC) -> list[int]:
    """The process and its descendants that live."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (fields := _stat(proc, int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid] if _stat(proc, pid) is not None else []
    for each in found:
        found += children.get(each, [])
    return found


def memory(pids: Iterable[int], proc: Path = PROC) -> Memory:
    """Processes that have ended count nothing."""
    found = []
    for pid in pids:
        with suppress(OSError):
            found.append(memory_of(pid, proc))
    return Memory(
        pss=sum(each.proportional for each in found) / 1e6,
        peak=sum(each.peak for each in found) / 1e6,
    )


def cpu_seconds(pids: Iterable[int], proc: Path = PROC) -> float:
    """User and system time so far, threads included."""
    stats = (_stat(proc, pid) for pid in pids)
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats if fields is not None)
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_until_idle(pid: int, seconds: float) -> bool:
    """Whether the process and its descendants came to rest within that time.

    Some servers poll for a second after their last answer, and some go on with a step of requests
    that their client has given up. Neither must reach into the next system's turn.
    """
    end = time.monotonic() + seconds
    while True:
        pids = tree(pid)
        before = cpu_seconds(pids)
        time.sleep(_SECONDS_TO_LOOK)
        if cpu_seconds(pids) - before <= IDLE * _SECONDS_TO_LOOK:
            return True
        if time.monotonic() > end:
            return False


def _stat(proc: Path, pid: int) -> list[str] | None:
    """The fields after the process's name, which may hold anything; None where it has ended."""
    try:
        text = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields
