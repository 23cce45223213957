"""What `loraplex serve` was asked for: built once, from the command line, and passed down."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Every setting of the server. None: chosen at start from the machine or the model."""

    store: Path
    cache: Path
    model: str = DEFAULT_MODEL
    device: str = "auto"
    dtype: str | None = None
    listen: Address = Address("127.0.0.1", 50051)
    metrics: Address | None = Address("127.0.0.1", 9464)
    insecure: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_rank: int = 64
    max_slots: int = 64
    memory: int | None = None  # bytes of the arena
    host_memory: int | None = None  # bytes of adapters kept in host memory
    max_running: int = 64
    max_waiting: int = 1024
    max_step_tokens: int = 512
    prefill_share: float = 0.7  # by such a part of its time prompts may lengthen streams' step
    max_adapter_bytes: int = 2**30
    context_length: int | None = None
    threads: int | None = None
    cuda_graphs: bool = True
    prefix_cache: bool = True
    speculation: bool = True
    max_draft_tokens: int = 8
    step_log: Path | None = None
    drain_seconds: float = 30.0


def parse_address(text: str) -> Address:
    """`HOST:PORT` or `[IPV6]:PORT`; ValueError says what is wrong."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Address(match[1] or match[2], int(match[3]))


def parse_size(text: str) -> int:
    """Bytes: `1536M`, `2GiB`, `2g` or a plain number; units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(size: int) -> str:
    """`1.5 GiB`."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Models, compiled ops and whatever else can be made again."""
    return _xdg(environ, "XDG_CACHE_HOME", ".cache")


def data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """What must not be lost: the store of uploaded adapters."""
    return _xdg(environ, "XDG_DATA_HOME", ".local/share")


def _xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    """`loraplex` in an XDG base directory; a relative one is ignored, as the specification asks."""
    base = Path(environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / fallback) / "loraplex"
