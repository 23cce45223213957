"""`loraplex check`: every op against plain fp32 maths on this device, and its time.

On a CPU these are the torch ops, the compiled ones (and a stack of layers as one op of theirs, as
serves where there are matrix tiles), and the Triton kernels in Triton's interpreter on tiny shapes.
On a GPU they are the Triton kernels over the model's own shapes; `--save` keeps the verdict, and
measures which way each 4-bit product is best computed: in this process, and so after the table was
printed.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from loraplex_kernels.cases import SERVING, TINY, ModelShapes
from loraplex_kernels.check import Outcome, brief
from loraplex_kernels.gpu.target import target_of
from loraplex_kernels.isolated import IsolationError, Progress, Task, run_isolated
from loraplex_kernels.native import BuildError
from loraplex_kernels.timing import copy_bytes_per_second
from loraplex_kernels.verdicts import FOLDER, Environment, VerdictKey, is_conclusive, save_verdict

from loraplex.check_report import Report, Section, print_json, print_notes, print_report
from loraplex.check_stack import stack_case
from loraplex.config import DEFAULT_MODEL
from loraplex.device import INTERPRETER, Device, available_cores, choose_device
from loraplex.errors import LoraplexError
from loraplex.progress import progress_bar
from loraplex.shapes import read_shapes

TINY_SHAPES = ModelShapes(
    name="tiny",
    hidden_size=128,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_layers=2,
)
"""For the interpreter, which takes a second a launch."""


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """What `loraplex check` was asked for."""

    cache: Path
    model: str = DEFAULT_MODEL
    device: str = "auto"
    max_rank: int = 64
    threads: int | None = None  # None: one a core
    as_json: bool = False
    is_saved: bool = False


Run = Callable[[Task, Progress], Iterable[Outcome]]


def run_task(task: Task, progress: Progress) -> Iterator[Outcome]:
    """Kernels that may take their process down run in one of their own."""
    if task.ops in ("triton", "interpreter"):
        yield from run_isolated(task, progress)
        return
    cases = task.cases()
    if task.ops == "native":
        cases.append(stack_case(task.shapes, task.dtype, task.max_rank))
    for done, outcome in enumerate(task.run(cases), start=1):
        yield outcome
        progress(done, len(cases))


def check(config: CheckConfig, run: Run = run_task) -> int:
    """Print what was found; LoraplexError names what failed."""
    torch.set_num_threads(config.threads or available_cores())
    device = choose_device(config.device, None)
    shapes = read_shapes(config.model, config.cache)
    report = examine(device, shapes, config, run)
    if not config.as_json:
        print_report(report, sys.stdout)  # before anything else can go wrong
    saved = save(report, device, shapes, config) if config.is_saved else report
    if config.as_json:
        print_json(saved, sys.stdout)
    else:
        print_notes(saved.notes[len(report.notes) :], sys.stdout)
    if report.failed:
        raise LoraplexError(f"the check failed for: {', '.join(report.failed)}")
    return 0


def examine(device: Device, shapes: ModelShapes, config: CheckConfig, run: Run) -> Report:
    """Check all that this device has."""
    copy_speed = _copy_bytes_per_second(device)
    notes: list[str] = []
    sections = []
    for task in tasks_for(device, shapes, config):
        outcomes = _outcomes(task, run, notes)
        sections.append(Section(task.ops, task.dtype, outcomes))
    return Report(
        device=device.name,
        target=target_of(device.where) if device.name == "cuda" else None,
        environment=Environment.of(device.where),
        model=None if device.name == INTERPRETER else shapes.name,
        max_rank=config.max_rank,
        copy_bytes_per_second=copy_speed,
        sections=tuple(sections),
        paths=None,
        notes=tuple(notes),
    )


def _copy_bytes_per_second(device: Device) -> float:
    """Its memory is given back, for the check is in another process."""
    try:
        return copy_bytes_per_second(device.where)
    except torch.OutOfMemoryError as error:
        raise LoraplexError("not enough free memory on the device for the check") from error
    finally:
        if device.name == "cuda":
            torch.cuda.empty_cache()


def tasks_for(device: Device, shapes: ModelShapes, config: CheckConfig) -> list[Task]:
    interpreted = Task(
        ops="interpreter",
        device="cpu",
        dtype=torch.float16,
        shapes=TINY_SHAPES,
        max_rank=config.max_rank,
        scale=TINY,
        is_timed=False,
        cache=config.cache / "native",
    )
    if device.name == INTERPRETER:
        return [interpreted]
    full = replace(interpreted, dtype=device.dtype, shapes=shapes, scale=SERVING, is_timed=True)
    if device.name == "cuda":
        return [replace(full, ops="triton", device="cuda")]
    return [replace(full, ops="torch"), replace(full, ops="native"), interpreted]


def _outcomes(task: Task, run: Run, notes: list[str]) -> tuple[Outcome, ...]:
    """None, and a note, where a compiler or triton is not there."""
    if task.ops == "interpreter" and find_spec("triton") is None:
        notes.append("the Triton kernels are left out: triton is not installed")
        return ()
    try:
        with progress_bar(f"Checking the {task.ops} ops") as progress:
            return tuple(run(task, progress))
    except BuildError as error:
        notes.append(f"the native ops are left out: {error}")
        return ()
    except IsolationError as error:
        raise LoraplexError(f"the {task.ops} ops cannot be checked: {error}") from error


def save(report: Report, device: Device, shapes: ModelShapes, config: CheckConfig) -> Report:
    """Store what `serve` would use; the report with the linear paths, and notes on all this."""
    if device.name != "cuda":
        nothing = "nothing is stored: serve checks its kernels on a GPU only"
        return replace(report, notes=(*report.notes, nothing))
    key = VerdictKey(report.environment, shapes, str(device.dtype), config.max_rank)
    (section,) = report.sections
    return save_measured(report, key, section.outcomes, device, config.cache)


def save_measured(
    report: Report, key: VerdictKey, outcomes: tuple[Outcome, ...], device: Device, cache: Path
) -> Report:
    """The verdict, then the table of linear paths as measured now."""
    from loraplex_kernels.gpu.measured import save_paths
    from loraplex_kernels.gpu.trusted import measured_paths

    failed = frozenset(save_verdict(key, cache, outcomes))
    notes = [*report.notes, _word_on_verdict(outcomes, cache)]
    try:
        with progress_bar("Measuring the 4-bit products") as progress:
            paths = measured_paths(
                device.where, key.shapes, device.dtype, key.max_rank, failed, progress
            )
    except Exception as error:  # whatever a driver comes up with: the report outlives it
        notes.append(f"the 4-bit products cannot be measured: {brief(error)}")
        return replace(report, notes=tuple(notes))
    where = save_paths(key.environment, key.dtype, cache, paths)
    notes.append(f"the 4-bit products are measured, in {where}, for serve")
    return replace(report, paths=paths, notes=tuple(notes))


def _word_on_verdict(outcomes: tuple[Outcome, ...], cache: Path) -> str:
    if is_conclusive(outcomes):
        return f"the verdict is stored in {cache / FOLDER}, for serve"
    return "the verdict is not stored: memory, time or a compiler may have been short"
