"""The CUDA path, its kernels in Triton's interpreter, against the float32 CPU path.

A tiny random Llama goes through scheduler, arena, Triton ops and sampler; every token is forced to
be the CPU path's, so that the logits of every position can be compared.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import read_model_config
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex_kernels.gpu import interpreter
from loraplex_kernels.gpu.launch import Grid, launch_now
from loraplex_kernels.gpu.ops import TritonOps
from loraplex_kernels.gpu.paths import EVERY_KERNEL
from loraplex_kernels.ops import Ops
from transformers import LlamaForCausalLM

from tests.exactness.cases import Folders, Generated, of_rank, on, tiny_config
from tests.exactness.harness import CPU, Answer, Harness, Request

VOCAB = 160
ADAPTERS = {
    "rank 3": of_rank(3, torch.float32),
    "rank 40": of_rank(40, torch.float16),
    "q, v": on(["q_proj", "v_proj"], 8, torch.float32, 0.3),
    "down": on(["down_proj"], 16, torch.bfloat16, 0.3),
    "DoRA": Generated(torch.float32, config={"r": 8, "lora_alpha": 8, "use_dora": True}),
    "vocabulary": on(["embed_tokens", "lm_head"], 8, torch.float32, 0.3),
}
# The longest prompt is one long segment; together they take more than one step.
LENGTHS = {"rank 3": 7, None: 5, "rank 40": 70, "q, v": 21, "down": 2, "DoRA": 4, "vocabulary": 3}
MAX_STEP_TOKENS = 72
LIMIT = {torch.float16: 1e-2, torch.float32: 1e-5}
KERNELS = {
    "_add_rms_norm",
    "_attention",
    "_dequantize",
    "_expand",
    "_rotary_and_cache",
    "_scale_output",
    "_shrink",
    "_silu_mul",
}
"""The fused product `_linear` is for 16-bit activations."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(VOCAB)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(model, tmp_path_factory.mktemp("adapters"), ADAPTERS)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    torch.manual_seed(1)
    return [
        Request(adapter, torch.randint(VOCAB, (length,)).tolist(), max_tokens=3)
        for adapter, length in LENGTHS.items()
    ]


def harness(
    model: Path, folders: Folders, dtype: torch.dtype, form: WeightForm, ops: Ops
) -> Harness:
    options = LoadOptions(CPU, dtype, form)
    decoder = load_decoder(Checkpoint(model), read_model_config(model), options)
    return Harness(decoder, ops, folders, num_blocks=64)


@pytest.fixture(scope="module")
def expected(model: Path, folders: Folders, requests: list[Request], ops: Ops) -> list[Answer]:
    on_cpu = harness(model, folders, torch.float32, WeightForm.DENSE, ops)
    answers, _ = on_cpu.run(requests, MAX_STEP_TOKENS)
    return answers


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_triton_ops_give_the_logits_of_the_cpu_path(
    dtype: torch.dtype,
    model: Path,
    folders: Folders,
    requests: list[Request],
    expected: list[Answer],
) -> None:
    launched: list[str] = []

    def launch(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
        launched.append(kernel.fn.__name__)
        launch_now(kernel, grid, *args, **meta)

    interpreter.repair()
    ops = TritonOps(CPU, "interpreter", EVERY_KERNEL, launch=launch)
    forced = [
        replace(request, forced=answer.tokens)
        for request, answer in zip(requests, expected, strict=True)
    ]
    on_triton = harness(model, folders, dtype, WeightForm.PACKED, ops)
    answers, steps = on_triton.run(forced, MAX_STEP_TOKENS)
    assert any(len(step.num_tokens) > 1 for step in steps)
    assert {*launched} == KERNELS | ({"_linear"} if dtype is torch.float16 else set())
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.logits.shape == reference.logits.shape
        error = (answer.logits - reference.logits).abs().max() / reference.logits.abs().max()
        assert float(error) < LIMIT[dtype]
