"""The table of linear paths: measured on a device, kept in the user's cache, read by `serve`."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loraplex_kernels.cases import CaseMaker, LinearShape, Prepared
from loraplex_kernels.cases.table import mixed_ranks, mixed_slots
from loraplex_kernels.check import Timer, brief
from loraplex_kernels.gpu.paths import UNMEASURED, LinearPath, PathTable, Steps
from loraplex_kernels.isolated import Progress
from loraplex_kernels.ops import Ops
from loraplex_kernels.segments import LONG_TILE_ROWS
from loraplex_kernels.verdicts import FOLDER, Environment, write_json

log = logging.getLogger(__name__)

FORMAT = 1
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MARGIN = 0.05
"""A path is left only for one that is quicker by this part, so that noise moves nothing."""

Times = Mapping[int, Mapping[LinearPath, float]]
"""Seconds by rows and path; a path that cannot be taken is left out."""


def measure(
    make: CaseMaker,
    usable: Iterable[LinearPath],
    ops_of: Callable[[PathTable], Ops],
    timer: Timer,
    progress: Progress = lambda done, total: None,
) -> PathTable:
    """Time each path that may be used, on batches of mixed adapters, and keep the quickest.

    A path that raises is not taken for that shape, at any rows; where bitsandbytes' own does, there
    is nothing to fall back on, and the shape is left out.
    """
    ops = {path: ops_of(PathTable({}, ((1, path),))) for path in usable}
    linears = make.shapes.linears
    measured: dict[tuple[int, int], Steps] = {}
    for index, linear in enumerate(linears):
        trial = _Trial(make, linear, ops, timer)
        for rows in ROWS:
            trial.add(rows)
            progress(index * len(ROWS) + len(trial.by_rows), len(linears) * len(ROWS))
        if LinearPath.BITSANDBYTES in trial.usable:
            measured[linear.out_features, linear.in_features] = steps_of(trial.of_usable())
    return PathTable(measured)


class _Trial:
    """The times of one linear. Mutable: `by_rows`, and `usable`, the paths that never raised."""

    def __init__(
        self, make: CaseMaker, linear: LinearShape, ops: Mapping[LinearPath, Ops], timer: Timer
    ) -> None:
        self.by_rows: dict[int, dict[LinearPath, float]] = {}
        self.usable = set(ops)
        self._make = make
        self._linear = linear
        self._ops = ops
        self._timer = timer

    def add(self, rows: int) -> None:
        times: dict[LinearPath, float] = {}
        self.by_rows[rows] = times
        for path, ops in self._ops.items():
            if path in self.usable and (path is not LinearPath.FUSED or rows <= LONG_TILE_ROWS):
                try:
                    times[path] = self._timer(partial(self._prepared(rows).call, ops))
                except Exception as raised:  # whatever a compiler or a driver comes up with
                    self.usable.remove(path)
                    shape = self._linear.out_features, self._linear.in_features
                    log.warning("%s is left out for %dx%d: %s", path.value, *shape, brief(raised))

    def _prepared(self, rows: int) -> Prepared:
        ranks = mixed_ranks(self._linear, self._make.max_rank)
        prepared = self._make.nf4_linear(self._linear, ranks, mixed_slots(rows)).prepare()
        prepared.poison()
        return prepared

    def of_usable(self) -> Times:
        return {
            rows: {path: seconds for path, seconds in times.items() if path in self.usable}
            for rows, times in self.by_rows.items()
        }


def steps_of(times: Times) -> Steps:
    """From bitsandbytes' path on, change to the quickest where that is worth it."""
    steps: list[tuple[int, LinearPath]] = []
    path = LinearPath.BITSANDBYTES
    for rows, options in sorted(times.items()):
        start = rows
        if path not in options:  # the fused kernel ends between two measured rows
            path, start = LinearPath.BITSANDBYTES, LONG_TILE_ROWS + 1
        quickest = min(options, key=lambda option: options[option])
        if options[quickest] < options[path] * (1 - MARGIN):
            path = quickest
        if not steps or steps[-1][1] is not path:
            steps.append((start, path))
    return tuple(steps)


def load_paths(environment: Environment, dtype: str, cache: Path) -> PathTable:
    """What was measured here with these very kernels; UNMEASURED where nothing was."""
    try:
        stored = _read(cache)["devices"][environment.device]
        if stored["for"] != _identity(environment, dtype):
            return UNMEASURED
        return PathTable({_shape(name): _steps(own) for name, own in stored["linears"].items()})
    except (ValueError, LookupError, TypeError, AttributeError):
        return UNMEASURED


def save_paths(environment: Environment, dtype: str, cache: Path, table: PathTable) -> Path:
    """Beside what other devices measured, and this one for other models; the file's path."""
    known = load_paths(environment, dtype, cache)
    own = {"for": _identity(environment, dtype), "linears": {**known.plain(), **table.plain()}}
    stored = _read(cache)
    devices = {**stored.get("devices", {}), environment.device: own}
    write_json(_path(cache), {"format": FORMAT, "devices": devices})
    return _path(cache)


def _identity(environment: Environment, dtype: str) -> dict[str, str]:
    return {
        "sources": environment.sources,
        "triton": environment.triton_version,
        "torch": environment.torch_version,
        "bitsandbytes": environment.bitsandbytes_version,
        "driver": environment.driver,
        "dtype": dtype,
    }


def _read(cache: Path) -> dict[str, Any]:
    """Empty where there is nothing that can be read."""
    try:
        stored = json.loads(_path(cache).read_bytes())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(stored, dict) and stored.get("format") == FORMAT
    return stored if is_ours and isinstance(stored.get("devices"), dict) else {}


def _path(cache: Path) -> Path:
    return cache / FOLDER / "linear-paths.json"


def _shape(name: str) -> tuple[int, int]:
    out_features, in_features = map(int, name.split("x"))
    return out_features, in_features


def _steps(stored: list[tuple[int, str]]) -> Steps:
    """ValueError unless they ascend from 1, as `PathTable.choose` needs."""
    steps = tuple((int(rows), LinearPath(path)) for rows, path in stored)
    starts = [rows for rows, _ in steps]
    if not starts or starts[0] != 1 or starts != sorted(set(starts)):
        raise ValueError("steps that do not ascend from 1")
    return steps
