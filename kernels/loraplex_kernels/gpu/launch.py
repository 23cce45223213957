"""How kernels are launched: for real, or by whatever a test or the compile report puts there."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

Grid = tuple[int, ...]

LAUNCH_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}
"""Of every launch. Triton's own default for fused multiply-adds is about to change."""


class Launch(Protocol):
    """`launch(kernel, grid, *pointers_and_scalars, **constexprs_and_options)`."""

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None: ...


def launch_now(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    """On the current device and stream; nothing for an empty grid."""
    if all(grid):
        kernel[grid](*args, **LAUNCH_OPTIONS, **meta)


@cache
def configs(kernel: str, target: str) -> Mapping[str, Mapping[str, int]]:
    """The launch configurations of one kernel by use ("decode", "prefill"), from configs/*.json.

    A file maps "default" to uses, and a target ("sm_100", "gfx942", "interpreter") to the uses it
    overrides. Other AMD devices take gfx942's: their compiler does not know all of the others'
    options. Tables and not `triton.autotune`, which would time inside the first requests and
    cannot run while a graph is captured.
    """
    table = json.loads(files(__package__).joinpath(f"configs/{kernel}.json").read_text())
    if target.startswith("gfx"):
        target = "gfx942"
    return {**table["default"], **table.get(target, {})}
