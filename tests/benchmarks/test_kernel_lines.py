"""What the kernel benchmark asks for, times and prints; on the CPU, with torch's ops for ours."""

from collections.abc import Callable
from dataclasses import replace

import kernel_speed
import pytest
import torch
from kernel_lines import Line, Wanted, lines, timed, ways_of
from kernel_times import floors, times
from loraplex_kernels.cases import ModelShapes
from loraplex_kernels.gpu.ops import KERNELS
from loraplex_kernels.reference import TorchOps
from popularity import POPULARITIES

CPU, META = torch.device("cpu"), torch.device("meta")
TINY = ModelShapes("tiny", 64, 128, 4, 2, 16, 2)
EVERYTHING = Wanted(KERNELS, (1, 8), (16, 32), POPULARITIES)

LORA = Line("A, B", "lora", "qkv", 8, 16, "zipf", 3, 3_350_000, {})
BASE = replace(LORA, kernel="nf4_linear")
NORM = replace(LORA, kernel="add_rms_norm", what="", rank=None, popularity=None, num_adapters=0)


def test_every_op_size_rank_and_popularity_is_asked_once() -> None:
    asked = [line for line, _ in lines([TINY], EVERYTHING, META, torch.bfloat16)]

    assert {line.kernel for line in asked} == set(KERNELS)
    assert len(asked) == len(set(map(str, asked)))
    loras = [line for line in asked if line.kernel == "lora" and line.what == "down"]
    of_one = [(line.rank, line.num_adapters) for line in loras if line.rows == 1]
    assert of_one == [(16, 1), (32, 1)]
    of_eight = {line.popularity: line.num_adapters for line in loras if line.rows == 8}
    assert of_eight["distinct"] == 8
    assert of_eight["identical"] == of_eight.get("skewed", 1) == 1


def test_models_of_one_shape_share_their_lines() -> None:
    twin = replace(TINY, name="twin", num_layers=9)
    other = replace(TINY, name="other", hidden_size=128)
    wanted = Wanted(("silu_mul",), (1,), (16,), POPULARITIES)

    asked = [line for line, _ in lines([TINY, other, twin], wanted, META, torch.bfloat16)]

    assert [line.models for line in asked] == ["tiny, twin", "other"]


def test_bytes_grow_with_adapters_and_rank() -> None:
    wanted = Wanted(("nf4_linear",), (8,), (16, 32), ("identical", "distinct"))
    asked = [line for line, _ in lines([TINY], wanted, META, torch.bfloat16) if line.what == "qkv"]
    one, eight, _, eight_of_32 = (line.bytes_moved for line in asked)

    adapter = 2 * 16 * (3 * 64 + 64 + 32 + 32)
    assert eight - one == 7 * adapter
    assert eight_of_32 - eight == 8 * adapter


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_way_is_timed_on_the_same_tensors(kernel: str) -> None:
    calls = []

    def timer(call: Callable[[], None]) -> float:
        call()
        calls.append(call)
        return float(len(calls))

    wanted = Wanted((kernel,), (4,), (16,), ("uniform",))
    line, case = next(lines([TINY], wanted, CPU, torch.float32))
    ops = TorchOps()

    done = timed(line, case, dict.fromkeys(ways_of(line), ops), timer)

    assert done.seconds == {way: index + 1.0 for index, way in enumerate(ways_of(line))}
    assert done.best == 1.0
    assert done.times_torch == len(calls)


def test_the_fused_kernel_is_not_asked_for_more_rows_than_it_takes() -> None:
    assert ways_of(BASE) == ("fused", "bitsandbytes", "dequantized", "torch")
    assert ways_of(replace(BASE, rows=65)) == ("bitsandbytes", "dequantized", "torch")
    assert ways_of(LORA) == ("triton", "torch")


def test_floors_are_bytes_over_a_stated_bandwidth() -> None:
    assert floors([LORA, NORM]).splitlines() == [
        "| models | op | rows | rank | popularity | adapters | MB | H100 us | A100 us | L4 us |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| A, B | lora qkv | 8 | 16 | zipf | 3 | 3.35 | 1.0 | 1.6 | 11.2 |",
        "| A, B | add_rms_norm | 8 |  |  |  | 3.35 | 1.0 | 1.6 | 11.2 |",
    ]


def test_times_stand_beside_the_floor_and_torch() -> None:
    base = replace(
        BASE, rows=128, seconds={"bitsandbytes": 4e-6, "dequantized": 2e-6, "torch": 6e-6}
    )
    lora = replace(LORA, seconds={"triton": 4e-6, "torch": 1e-5})

    of_base, others = times([base, lora], bytes_per_second=3.35e12).split("\n\n")

    assert of_base.splitlines()[0].endswith(
        "| floor us | fused us | bitsandbytes us | dequantized us | torch us "
        "| floor / best | torch / best |"
    )
    assert of_base.splitlines()[2].endswith("| 3.35 | 1.0 |  | 4.0 | 2.0 | 6.0 | 50% | 3.0 |")
    assert others.splitlines()[2].endswith("| 3.35 | 1.0 | 4.0 | 10.0 | 25% | 2.5 |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_speed.main(["--models", "Qwen2.5-7B", "--rows", "8", "--ranks", "16"]) == 0

    out = capsys.readouterr().out
    assert out.startswith("No GPU here: nothing below was run.")
    assert "| Qwen2.5-7B | nf4_linear down | 8 | 16 | distinct | 8 |" in out
    assert "Compiled ahead of time" in out
    with pytest.raises(SystemExit):
        kernel_speed.main(["--save", "nothing"])
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_way_that_cannot_run_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def timer(call: Callable[[], None]) -> float:
        if not caplog.records:
            raise RuntimeError("out of resources")
        return 1.0

    wanted = Wanted(("silu_mul",), (4,), (16,), ("uniform",))
    line, case = next(lines([TINY], wanted, CPU, torch.float32))

    done = timed(line, case, dict.fromkeys(ways_of(line), TorchOps()), timer)

    assert done.seconds == {"torch": 1.0}
    assert done.best is None
    assert caplog.messages == ["triton, silu_mul, 4 rows: out of resources"]
