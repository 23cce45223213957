"""What goes wrong between a loaded model and the ready line is said in one line."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from loraplex import startup
from loraplex.adapters.packing import PackedAdapter, Placed
from loraplex.config import ServeConfig
from loraplex.device import Device, free_host_memory
from loraplex.engine.model_runner import BlockShape
from loraplex.errors import StartupError
from loraplex.startup import (
    Base,
    Memory,
    build_host_tier,
    build_runner,
    plan_memory,
    warn_of_little,
)
from loraplex_kernels.reference import TorchOps

from tests.server.engine.tiny_llama import CONFIG, CPU, TinyLlama

SETTINGS = ServeConfig(store=Path("store"), cache=Path("cache"), max_rank=16, max_slots=1)


class Raising(TorchOps):
    """On a device that has no such kernel."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def base_linear(self, *_: Any) -> None:
        raise self._error


def base(ops: TorchOps, device: str = "cpu") -> Base:
    return Base(
        name="tiny",
        identity="0",
        config=CONFIG,
        defaults=cast(Any, None),
        tokenizer=cast(Any, None),
        decoder=TinyLlama(torch.float32, 16, 1).decoder,
        ops=ops,
        device=Device(device, CPU, torch.float32),
    )


MEMORY = Memory(16, BlockShape(16, 16 * 2 * CONFIG.num_layers * 64 * 4), host_bytes=0)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("no kernel image"), "a trial step failed on this device: no kernel image"),
        (torch.OutOfMemoryError("..."), "--memory leaves too little"),
    ],
)
def test_a_device_that_cannot_run_a_step_serves_nobody(error: Exception, why: str) -> None:
    with pytest.raises(StartupError, match=why):
        build_runner(SETTINGS, base(Raising(error)), MEMORY)


def test_room_is_left_for_what_the_steps_need() -> None:
    on_gpu = base(TorchOps(), "cuda")  # its memory is still the host's, for this test
    with_graphs = plan_memory(SETTINGS, on_gpu).size
    without = plan_memory(replace(SETTINGS, cuda_graphs=False), on_gpu).size
    assert without >= with_graphs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            replace(SETTINGS, memory=1 << 50),
            "--memory 1024 TiB cannot be had: .* beside what the steps need",
        ),
        (
            replace(SETTINGS, memory=1000),
            "--memory 1000 B is too small: this model needs at least ",
        ),
        (replace(SETTINGS, host_memory=1 << 50), "--host-memory 1024 TiB cannot be had: "),
        (replace(SETTINGS, max_slots=10**12), "--max-slots 1000000000000 is too large: "),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_flag(
    device: str, settings: ServeConfig, why: str
) -> None:
    with pytest.raises(StartupError, match=why):
        plan_memory(settings, base(TorchOps(), device))


@pytest.mark.parametrize(
    ("num_blocks", "said"),
    [
        (2, ["holds only 32 tokens of a context of 128 and no adapter of rank 16 on all modules"]),
        (1000, []),
    ],
)
def test_a_memory_that_holds_little_is_told(
    num_blocks: int, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_little(base(TorchOps()), replace(MEMORY, num_blocks=num_blocks))
    assert [record.message.removeprefix("--memory 32.0 KiB ") for record in caplog.records] == said


def test_host_memory_is_a_part_of_what_is_free_or_what_was_asked_for() -> None:
    planned = plan_memory(SETTINGS, base(TorchOps()))
    assert 0 < planned.host_bytes <= free_host_memory()
    for asked in (0, 12345):
        assert (
            plan_memory(replace(SETTINGS, host_memory=asked), base(TorchOps())).host_bytes == asked
        )


@pytest.mark.parametrize(("device", "taken"), [("cpu", 3000), ("cuda", 4096)])
def test_the_budget_counts_what_memory_is_taken(device: str, taken: int) -> None:
    """Torch pins memory in powers of two."""
    tier = build_host_tier(base(TorchOps(), device), MEMORY)
    tier.put("a", PackedAdapter(torch.empty(3, 1000, dtype=torch.uint8), Placed(())))
    assert tier.num_bytes == taken


@pytest.mark.parametrize("is_there", [False, True])
def test_a_start_that_compiles_says_so(
    is_there: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(startup, "is_built", lambda cache: is_there)
    monkeypatch.setattr(startup, "cpu_ops", lambda cache: TorchOps())
    with caplog.at_level(logging.INFO):
        startup._build_cpu_ops(Path("cache/native"))
    said = ["compiling the CPU's ops, once, into cache/native"]
    assert [record.message for record in caplog.records] == ([] if is_there else said)
