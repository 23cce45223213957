"""`loraplex check`: what it runs where, what it prints, how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.check import TINY_SHAPES, CheckConfig, Run, check, examine, save_measured, tasks_for
from loraplex.check_report import Report, Section, print_json, print_report
from loraplex.check_stack import stack_case
from loraplex.config import DEFAULT_MODEL
from loraplex.device import Device
from loraplex.errors import LoraplexError, ModelError
from loraplex.model.config import read_model_config
from loraplex.model.default import ensure_default_model
from loraplex.shapes import DEFAULT_SHAPES, read_shapes, shapes_of
from loraplex_kernels.check import Outcome
from loraplex_kernels.check import check as check_cases
from loraplex_kernels.gpu.measured import load_paths
from loraplex_kernels.gpu.ops import KERNELS
from loraplex_kernels.gpu.paths import LinearPath, PathTable
from loraplex_kernels.isolated import IsolationError, Progress, Task
from loraplex_kernels.native import BuildError
from loraplex_kernels.ops import LoraInput, Projection
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.verdicts import Environment, VerdictKey, load_verdict

RIGHT = Outcome(
    kernel="lora",
    case="qkv, 8 adapters",
    num_rows=64,
    error=2.5e-3,
    failure=None,
    is_lasting=True,
    seconds=2e-5,
    bytes_moved=1_000_000,
)
WRONG = replace(RIGHT, kernel="attention", error=0.5, failure="off by 5e-01", seconds=None)
CASE_KEYS = {
    *("ops", "kernel", "case", "rows", "dtype", "error", "limit", "passed", "failure"),
    *("seconds", "bytes_moved", "bytes_per_second", "of_copy"),
}
KEYS = {
    *("device", "target", "driver", "torch", "triton", "model", "max_rank"),
    *("copy_bytes_per_second", "passed", "failed", "cases", "paths", "notes"),
}
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    return folder


def config(cache: Path, **changes: Any) -> CheckConfig:
    return replace(CheckConfig(cache=cache, device="cpu", threads=1), **changes)


def examined(cache: Path, run: Run, device: str = "cpu") -> Report:
    where = Device(device, torch.device("cpu"), torch.bfloat16)
    return examine(where, DEFAULT_SHAPES, config(cache), run)


def found(*outcomes: Outcome) -> Callable[[Task, Progress], Iterable[Outcome]]:
    return lambda task, progress: outcomes


def test_a_cpu_checks_three_kinds_of_ops(tmp_path: Path) -> None:
    cpu = Device("cpu", torch.device("cpu"), torch.bfloat16)
    torch_ops, native, interpreted = tasks_for(cpu, DEFAULT_SHAPES, config(tmp_path))
    assert (torch_ops.ops, native.ops, interpreted.ops) == ("torch", "native", "interpreter")
    assert torch_ops.shapes == native.shapes == DEFAULT_SHAPES
    assert torch_ops.is_timed
    assert interpreted.shapes.hidden_size < 200
    assert (interpreted.dtype, interpreted.is_timed) == (torch.float16, False)


def test_other_devices_check_one(tmp_path: Path) -> None:
    gpu = Device("cuda", torch.device("cuda"), torch.bfloat16)
    (task,) = tasks_for(gpu, DEFAULT_SHAPES, config(tmp_path, max_rank=32))
    assert (task.ops, task.device, task.is_timed, task.max_rank) == ("triton", "cuda", True, 32)
    interpreter = Device("triton-interpret", torch.device("cpu"), torch.float16)
    (task,) = tasks_for(interpreter, DEFAULT_SHAPES, config(tmp_path))
    assert (task.ops, task.device) == ("interpreter", "cpu")


def test_all_right_is_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(config(tmp_path), found(RIGHT)) == 0
    out, err = capsys.readouterr()
    assert "3 of 3 cases passed\n" in out
    assert err == ""


def test_what_failed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoraplexError, match=r"failed for: torch attention, native attention, int"):
        check(config(tmp_path), found(RIGHT, WRONG, WRONG))
    out, _ = capsys.readouterr()
    assert "3 of 9 cases passed\n" in out
    assert out.count("FAILED: off by 5e-01") == 6


def test_a_table_in_a_pipe_is_plain_columns(tmp_path: Path) -> None:
    out = io.StringIO()
    print_report(examined(tmp_path, found(RIGHT, WRONG)), out)
    header, first, second = out.getvalue().splitlines()[2:5]
    assert header.split() == [
        *("ops", "kernel", "case", "rows", "error", "time", "moved", "rate", "of", "copy"),
        "verdict",
    ]
    assert first.split()[:8] == ["torch", "lora", "qkv,", "8", "adapters", "64", "2.5e-03", "20.0"]
    assert first.split()[-1] == "ok"
    assert second.split()[-9:] == ["-", "1.00", "MB", "-", "-", "FAILED:", "off", "by", "5e-01"]
    assert "\x1b" not in out.getvalue()


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoraplexError):
        check(config(tmp_path, as_json=True), found(RIGHT, WRONG))
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert set(report) == KEYS
    assert (report["passed"], report["failed"][0]) == (False, "torch attention")
    assert (report["device"], report["target"], report["paths"]) == ("cpu", None, None)
    assert report["model"] == DEFAULT_MODEL
    right, wrong = report["cases"][:2]
    assert set(right) == set(wrong) == CASE_KEYS
    assert right["bytes_per_second"] == pytest.approx(5e10)
    assert right["of_copy"] == pytest.approx(5e10 / report["copy_bytes_per_second"])
    assert (right["dtype"], right["limit"], right["rows"]) == ("bfloat16", 1e-2, 64)
    assert wrong["of_copy"] is wrong["bytes_per_second"] is wrong["seconds"] is None
    assert (right["passed"], wrong["passed"]) == (True, False)


def test_json_of_a_gpu(tmp_path: Path) -> None:
    """As it would be: no such device is needed to print it."""
    cpu = examined(tmp_path, found(RIGHT))
    report = Report(
        device="cuda",
        target="sm_90",
        environment=replace(cpu.environment, device="NVIDIA H100", driver="550.54"),
        model="llama",
        max_rank=64,
        copy_bytes_per_second=3e12,
        sections=(Section("triton", torch.bfloat16, (RIGHT,)),),
        paths=PathTable({(128, 64): ((1, LinearPath.FUSED), (65, LinearPath.BITSANDBYTES))}),
        notes=("stored",),
    )
    out = io.StringIO()
    print_json(report, out)
    printed = json.loads(out.getvalue())
    assert (printed["device"], printed["target"], printed["driver"]) == (
        *("NVIDIA H100", "sm_90", "550.54"),
    )
    assert printed["paths"] == {"128x64": [[1, "fused"], [65, "bitsandbytes"]]}
    out = io.StringIO()
    print_report(report, out)
    assert out.getvalue().startswith("NVIDIA H100 (sm_90), shapes of llama; 3000 GB/s in a copy\n")


def test_without_a_compiler_its_ops_are_left_out(tmp_path: Path) -> None:
    def run(task: Task, progress: Progress) -> Iterable[Outcome]:
        if task.ops == "native":
            raise BuildError("no C++ compiler found")
        return [RIGHT]

    report = examined(tmp_path, run)
    assert report.notes == ("the native ops are left out: no C++ compiler found",)
    assert [len(section.outcomes) for section in report.sections] == [1, 0, 1]


def test_what_cannot_begin_is_one_line(tmp_path: Path) -> None:
    def run(task: Task, progress: Progress) -> Iterable[Outcome]:
        raise IsolationError("its process ended before the first case")

    with pytest.raises(LoraplexError, match="the torch ops cannot be checked: its process ended"):
        examined(tmp_path, run)


def test_a_cpu_has_nothing_to_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    nothing = "nothing is stored: serve checks its kernels on a GPU only"
    check(config(cache, is_saved=True), found(RIGHT))
    assert capsys.readouterr().out.endswith(f"3 of 3 cases passed\n{nothing}\n")
    check(config(cache, is_saved=True, as_json=True), found(RIGHT))
    assert json.loads(capsys.readouterr().out)["notes"] == [nothing]
    assert not cache.exists()


def test_what_is_saved_is_what_serve_loads(model: Path, tmp_path: Path) -> None:
    """On a CPU; the kernels have failed, which would otherwise be timed in the interpreter."""
    cpu = Device("cpu", torch.device("cpu"), torch.float32)
    environment = Environment.of(cpu.where)
    key = VerdictKey(environment, read_shapes(str(model), tmp_path), str(cpu.dtype), 64)
    failed = [replace(WRONG, kernel=kernel) for kernel in ("lora", "nf4_linear")]
    outcomes = (replace(RIGHT, kernel="attention"), *failed)
    report = examined(tmp_path, found(*outcomes))
    saved = save_measured(report, key, outcomes, cpu, tmp_path)
    why = "off by 5e-01 (qkv, 8 adapters, 64 rows)"
    assert load_verdict(key, tmp_path) == {"lora": why, "nf4_linear": why}
    table = load_paths(environment, str(cpu.dtype), tmp_path)
    assert saved.paths == table
    assert set(table.measured) == {(128, 64), (64, 64), (256, 64), (64, 128)}
    assert set(table.measured.values()) == {((1, LinearPath.BITSANDBYTES),)}
    assert saved.notes == (
        f"the verdict is stored in {tmp_path / 'kernels'}, for serve",
        f"the 4-bit products are measured, in {tmp_path}/kernels/linear-paths.json, for serve",
    )


def test_a_report_outlives_what_cannot_be_measured(tmp_path: Path) -> None:
    """On a device that is not there: nothing is stored, as every kernel failed, and all is said."""
    nowhere = Device("cuda", torch.device("cuda", 99), torch.float16)
    report = examined(tmp_path, found(WRONG))
    key = VerdictKey(report.environment, DEFAULT_SHAPES, str(nowhere.dtype), 64)
    saved = save_measured(report, key, (WRONG,), nowhere, tmp_path / "cache")
    assert saved.sections == report.sections
    assert saved.paths is None
    verdict, paths = saved.notes
    assert verdict.startswith("the verdict is not stored: ")
    assert paths.startswith("the 4-bit products cannot be measured: ")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("device", "title"),
    [
        ("cpu", f"cpu, shapes of {DEFAULT_MODEL}, tiny ones in the interpreter; "),
        ("triton-interpret", "triton-interpret, tiny shapes; "),
    ],
)
def test_the_title_says_whose_shapes(tmp_path: Path, device: str, title: str) -> None:
    out = io.StringIO()
    report = examined(tmp_path, found(RIGHT), device)
    print_report(report, out)
    assert out.getvalue().startswith(title)
    out = io.StringIO()
    print_json(report, out)
    assert json.loads(out.getvalue())["model"] == (DEFAULT_MODEL if device == "cpu" else None)


def test_shapes_come_from_config_json_alone(model: Path, tmp_path: Path) -> None:
    shapes = read_shapes(str(model), tmp_path)
    assert (shapes.hidden_size, shapes.head_dim, shapes.num_kv_heads) == (64, 16, 2)
    assert (shapes.num_layers, shapes.block_tokens) == (2, 16)
    with pytest.raises(ModelError, match="no such folder"):
        read_shapes("no-such-folder", tmp_path)


def test_blocks_are_as_serve_makes_them(model: Path, tmp_path: Path) -> None:
    """Here 16 * 2048 elements, of which a token's KV is 128."""
    (model / "config.json").write_text(json.dumps({**TINY_CONFIG, "intermediate_size": 2048}))
    assert read_shapes(str(model), tmp_path).block_tokens == 256


def test_the_default_needs_no_file(tmp_path: Path) -> None:
    assert read_shapes(DEFAULT_MODEL, tmp_path) == DEFAULT_SHAPES
    real = read_model_config(ensure_default_model())
    assert shapes_of(DEFAULT_MODEL, real) == DEFAULT_SHAPES


class Forgetful(TorchOps):
    """One adapter's update of one module is missing in the last layer."""

    def lora_(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora: LoraInput,
        layer: int,
        projections: tuple[Projection, ...],
    ) -> None:
        if layer == 1 and len(projections) == 2:
            segments = tuple(s for s in lora.segments if s.slot != 2)
            lora = replace(lora, segments=segments)
        super().lora_(y, x, lora, layer, projections)


@pytest.mark.parametrize(("ops", "is_right"), [(TorchOps(), True), (Forgetful(), False)])
def test_a_stack_of_layers_is_checked(ops: TorchOps, is_right: bool) -> None:
    case = stack_case(TINY_SHAPES, torch.bfloat16, 64)
    (outcome,) = check_cases([case], ops, torch.bfloat16)
    assert (outcome.failure is None) == is_right


def test_the_command_on_a_cpu(model: Path) -> None:
    """The whole of it: torch's ops, the compiled ones, the kernels in the interpreter."""
    command = [sys.executable, "-m", "loraplex.cli", "check", "--device", "cpu"]
    result = subprocess.run(
        [*command, "--model", str(model), "--threads", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert (report["model"], report["passed"], report["notes"]) == ("tiny", True, [])
    assert {case["ops"] for case in report["cases"]} == {"torch", "native", "interpreter"}
    for ops in ("torch", "native", "interpreter"):
        kernels = {case["kernel"] for case in report["cases"] if case["ops"] == ops}
        assert kernels == {*KERNELS, *(["stack"] if ops == "native" else [])}


def test_ctrl_c_ends_it_with_its_child() -> None:
    command = [sys.executable, "-m", "loraplex.cli", "check", "--device", "triton-interpret"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children: list[str] = []
    while len(children) < 2:  # the child, and what multiprocessing keeps beside it
        assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "loraplex: interrupted\n")
    while any(is_running(child) for child in children):
        time.sleep(0.05)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False
