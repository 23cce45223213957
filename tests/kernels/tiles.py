"""Whether this machine has matrix tiles that a process may use."""

import ctypes
import shutil
from pathlib import Path

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


def _has_tiles() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or " amx_bf16" not in cpuinfo.read_text():
        return False
    syscall = ctypes.CDLL(None).syscall
    return int(syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


HAS_TILES = HAS_COMPILER and _has_tiles()
