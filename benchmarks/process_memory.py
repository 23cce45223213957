"""What a process holds in memory, as Linux counts it.

python -m process_memory MODULE...        run in benchmarks/
-> {"resident": N, ...}                   one line bare, and one after importing each module
"""

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes."""

    resident: int  # RSS: all pages of it that are in memory
    proportional: int  # PSS: those that n processes share count 1/n
    anonymous: int  # of the proportional: what no file stands behind
    file: int  # of the proportional: libraries, and files that are mapped
    peak: int  # the largest RSS so far


def memory_of(pid: int, proc: Path = PROC) -> ProcessMemory:
    """From smaps_rollup and status; OSError where there is no such process, or no Linux."""
    rollup = _kilobytes((proc / str(pid) / "smaps_rollup").read_text())
    status = _kilobytes((proc / str(pid) / "status").read_text())
    return ProcessMemory(
        resident=rollup["Rss"] * 1024,
        proportional=rollup["Pss"] * 1024,
        anonymous=rollup["Pss_Anon"] * 1024,
        file=(rollup["Pss_File"] + rollup["Pss_Shmem"]) * 1024,
        peak=status["VmHWM"] * 1024,
    )


def maps(pid: int, library: str, proc: Path = PROC) -> bool:
    """Whether a file with this in its path is mapped there."""
    return library in (proc / str(pid) / "maps").read_text()


def _kilobytes(text: str) -> dict[str, int]:
    """Lines such as `Rss:   1692 kB`."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0])
    return found


if __name__ == "__main__":
    itself = Path("/proc/self").resolve().name
    print(json.dumps(asdict(memory_of(int(itself)))), flush=True)
    for module in sys.argv[1:]:
        importlib.import_module(module)
        print(json.dumps(asdict(memory_of(int(itself)))), flush=True)
