"""The table of linear paths: what is chosen from times, and what is kept of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loraplex_kernels.cases import CaseMaker, ModelShapes
from loraplex_kernels.gpu.measured import ROWS, load_paths, measure, save_paths, steps_of
from loraplex_kernels.gpu.paths import UNMEASURED, LinearPath, PathTable, Steps
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.verdicts import Environment
from torch import Tensor

F, B, D = LinearPath.FUSED, LinearPath.BITSANDBYTES, LinearPath.DEQUANTIZED
ENVIRONMENT = Environment("abc", "3.9.0", "2.13.0", "0.50.2", "NVIDIA H100", "9.0", "550.54")
DTYPE = "torch.bfloat16"
TABLE = PathTable({(4096, 14336): ((1, B), (8, F), (65, D)), (10, 64): ((1, B),)})


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ({1: {B: 1.0}, 8: {B: 1.0}}, ((1, B),)),
        ({1: {B: 1.0, F: 0.5}, 8: {B: 1.0, F: 0.5}}, ((1, F),)),
        # Too little quicker to change for: noise.
        ({1: {B: 1.0, F: 0.96}, 8: {B: 1.0, F: 0.94}}, ((1, B), (8, F))),
        # And too little slower to change back.
        ({1: {B: 1.0, F: 0.5}, 8: {B: 0.96, F: 1.0}, 16: {B: 0.94, F: 1.0}}, ((1, F), (16, B))),
        # The fused kernel ends at 64 rows, wherever the next measured rows are.
        ({64: {B: 1.0, F: 0.5, D: 2.0}, 128: {B: 1.0, D: 0.5}}, ((64, F), (65, D))),
        ({64: {B: 1.0, F: 0.5, D: 0.6}, 128: {B: 1.0, D: 0.99}}, ((64, F), (65, B))),
        ({1: {B: 3.0, F: 1.0, D: 2.0}, 8: {B: 3.0, F: 2.0, D: 1.0}}, ((1, F), (8, D))),
    ],
)
def test_steps(times: dict[int, dict[LinearPath, float]], steps: Steps) -> None:
    assert steps_of(times) == steps


class TimedOps(TorchOps):
    """Every linear takes as long as a table says, on a clock of its own."""

    def __init__(self, clock: list[float], seconds: Callable[[int], float]) -> None:
        self._clock = clock
        self._seconds = seconds

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        self._clock[0] += self._seconds(x.shape[0])


SECONDS: dict[LinearPath, Callable[[int], float]] = {
    F: lambda rows: 1.0 + rows / 10,
    B: lambda rows: 2.0 + rows / 20,
    D: lambda rows: 20.0 + rows / 100,
}


def test_measuring() -> None:
    """Fused under 64 rows; then bitsandbytes up to where the dense product pays."""
    clock = [0.0]

    def ops_of(table: PathTable) -> TimedOps:
        return TimedOps(clock, SECONDS[table.choose(1, 1, 1)])

    def timer(call: Callable[[], None]) -> float:
        before = clock[0]
        call()
        return clock[0] - before

    shapes = ModelShapes("tiny", 64, 128, 2, 1, 32, 2)
    make = CaseMaker(shapes, torch.device("cpu"), torch.float32, 16)
    reports: list[tuple[int, int]] = []
    table = measure(make, LinearPath, ops_of, timer, lambda *done: reports.append(done))
    assert set(table.measured) == {(128, 64), (64, 64), (256, 64), (64, 128)}
    assert set(table.measured.values()) == {((1, F), (32, B), (512, D))}
    assert reports[-1] == (4 * len(ROWS), 4 * len(ROWS))
    assert len(reports) == 4 * len(ROWS)
    without = measure(make, [B, D], ops_of, timer)
    assert set(without.measured.values()) == {((1, B), (512, D))}


class RaisingOps(TimedOps):
    """Of one shape and from so many rows on, it cannot be run."""

    def __init__(self, clock: list[float], seconds: Callable[[int], float], rows: int) -> None:
        super().__init__(clock, seconds)
        self._rows = rows

    def linear(
        self,
        x: Tensor,
        weight: BaseWeight,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
        out: Tensor,
    ) -> None:
        if out.shape[1] == 256 and x.shape[0] >= self._rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().linear(x, weight, lora, layer, projections, out)


@pytest.mark.parametrize(
    ("raising", "steps"),
    [
        (F, ((1, B), (512, D))),  # not even at the rows where it could be run
        (D, ((1, F), (32, B))),
        (B, None),
    ],
)
def test_a_path_that_raises_is_left_out(raising: LinearPath, steps: Steps | None) -> None:
    clock = [0.0]

    def ops_of(table: PathTable) -> TimedOps:
        path = table.choose(1, 1, 1)
        rows = 16 if path is raising else 10_000
        return RaisingOps(clock, SECONDS[path], rows)

    def timer(call: Callable[[], None]) -> float:
        before = clock[0]
        call()
        return clock[0] - before

    shapes = ModelShapes("tiny", 64, 128, 2, 1, 32, 2)
    make = CaseMaker(shapes, torch.device("cpu"), torch.float32, 16)
    measured = dict(measure(make, LinearPath, ops_of, timer).measured)
    assert measured.pop((256, 64), None) == steps
    assert set(measured) == {(128, 64), (64, 64), (64, 128)}
    assert set(measured.values()) == {((1, F), (32, B), (512, D))}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_paths(ENVIRONMENT, DTYPE, tmp_path / "new", TABLE)
    assert path.exists()
    assert load_paths(ENVIRONMENT, DTYPE, tmp_path / "new") == TABLE
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_models_and_devices_stay(tmp_path: Path) -> None:
    other = replace(ENVIRONMENT, device="NVIDIA A100")
    save_paths(ENVIRONMENT, DTYPE, tmp_path, TABLE)
    save_paths(other, DTYPE, tmp_path, PathTable({(10, 64): ((1, F),)}))
    save_paths(ENVIRONMENT, DTYPE, tmp_path, PathTable({(10, 64): ((1, D),), (2, 64): ((1, B),)}))
    kept = load_paths(ENVIRONMENT, DTYPE, tmp_path).measured
    assert kept == {
        (4096, 14336): ((1, B), (8, F), (65, D)),
        (10, 64): ((1, D),),
        (2, 64): ((1, B),),
    }
    assert load_paths(other, DTYPE, tmp_path).measured == {(10, 64): ((1, F),)}


@pytest.mark.parametrize(
    "field", ["sources", "triton_version", "torch_version", "bitsandbytes_version", "driver"]
)
def test_what_other_kernels_took_is_not_used(tmp_path: Path, field: str) -> None:
    save_paths(ENVIRONMENT, DTYPE, tmp_path, TABLE)
    changed = replace(ENVIRONMENT, **{field: "other"})
    assert load_paths(changed, DTYPE, tmp_path) is UNMEASURED
    assert load_paths(ENVIRONMENT, "torch.float16", tmp_path) is UNMEASURED


@pytest.mark.parametrize(
    "steps", [[], [[2, "fused"]], [[1, "guess"]], [[1, "fused"], [1, "bitsandbytes"]], 3, [1], "x"]
)
def test_a_table_that_makes_no_sense_is_as_none(tmp_path: Path, steps: object) -> None:
    path = save_paths(ENVIRONMENT, DTYPE, tmp_path, TABLE)
    stored = json.loads(path.read_text())
    stored["devices"]["NVIDIA H100"]["linears"]["10x64"] = steps
    path.write_text(json.dumps(stored))
    assert load_paths(ENVIRONMENT, DTYPE, tmp_path) is UNMEASURED


@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b'{"format": 1}', b'{"format": 2}'])
def test_a_file_that_cannot_be_read_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = save_paths(ENVIRONMENT, DTYPE, tmp_path, TABLE)
    path.write_bytes(content)
    assert load_paths(ENVIRONMENT, DTYPE, tmp_path) is UNMEASURED
    save_paths(ENVIRONMENT, DTYPE, tmp_path, TABLE)
    assert load_paths(ENVIRONMENT, DTYPE, tmp_path) == TABLE


def test_unmeasured_is_bitsandbytes_everywhere() -> None:
    assert {UNMEASURED.choose(4096, 4096, rows) for rows in ROWS} == {B}
    assert [TABLE.choose(4096, 14336, rows) for rows in (1, 7, 8, 64, 65, 999)] == [
        B,
        B,
        F,
        F,
        D,
        D,
    ]
