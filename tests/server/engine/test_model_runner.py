"""The runner's steps: eager, replayed, and those before the first request."""

from typing import Any

import pytest
import torch
from loraplex.engine.batch import DeviceMemory
from loraplex.engine.graphs import DecodeGraphs, DecodeInputs, Forward
from loraplex.engine.model_runner import ModelRunner, RunnerConfig
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Scheduled
from loraplex.model.loader import Progress
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.ops import TritonOps
from loraplex_kernels.gpu.paths import UNMEASURED
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps

from tests.server.engine.lazy_streams import LazyCopyStream, LazyDevice
from tests.server.engine.recorded_graphs import Recorder
from tests.server.engine.tiny_llama import CONFIG as CONFIG_OF_MODEL
from tests.server.engine.tiny_llama import CPU, MAX_ROWS, TinyLlama

CONFIG = RunnerConfig(
    num_blocks=16, max_slots=3, max_rank=32, max_rows=80, max_running=MAX_ROWS, device=CPU
)


def runner(ops: Ops) -> ModelRunner:
    return ModelRunner(TinyLlama(torch.float32, 16, 1).decoder, ops, CONFIG)


def steps(runner: ModelRunner) -> list[int]:
    """What two sequences draw: their prompts in one step, and three decode steps."""
    sequences = [
        Sequence("a", [1, 2, 3], SamplingParams(temperature=0.0), StopParams(9), block_table=[4]),
        Sequence("b", [7] * 20, SamplingParams(temperature=0.0), StopParams(9), block_table=[2, 9]),
    ]
    drawn = []
    for step in range(4):
        done = [s.num_tokens - 1 if step else 0 for s in sequences]
        rows = [
            Scheduled(s, start, s.num_tokens - start, True)
            for s, start in zip(sequences, done, strict=True)
        ]
        for sequence, (sampled,) in zip(sequences, runner.run(rows), strict=True):
            sequence.output_token_ids.append(sampled.token_id)
            drawn.append(sampled.token_id)
    return drawn


def test_captured_steps_draw_what_eager_ones_do() -> None:
    recorder = Recorder(launch_now)
    captured = runner(TritonOps(CPU, "interpreter", UNMEASURED, launch=recorder.launch))

    def capture(
        forward: Forward,
        memory: DeviceMemory,
        max_rows: int,
        max_blocks: int,
        progress: Progress,
    ) -> DecodeGraphs:
        stream = LazyDevice(chance=[1]).stream()
        inputs = DecodeInputs(memory, max_rows, max_blocks, LazyCopyStream(stream, stream))
        return DecodeGraphs.capture(forward, inputs, recorder, progress)

    captured.capture_graphs(lambda done, total: None, capture)
    assert steps(captured) == steps(runner(TorchOps()))
    assert sum(graph.num_replays for graph in recorder.graphs) == 3


def logprobs(runner: ModelRunner, slot: int | None) -> dict[int, float]:
    """Of every token after one prompt, by the adapter in this slot."""
    params = SamplingParams(temperature=0.0, num_logprobs=CONFIG_OF_MODEL.vocab_size)
    sequence = Sequence("a", [1, 2, 3], params, StopParams(9), block_table=[15], slot=slot)
    ((sampled,),) = runner.run([Scheduled(sequence, 0, 3, True)])
    assert sampled.logprobs is not None
    return dict(sorted(sampled.logprobs.top))


def test_a_blend_is_the_weighted_sum_of_what_its_members_slots_hold() -> None:
    made = runner(TorchOps())
    packed = TinyLlama(torch.float32, 16, 1).adapter([16, 0, 8, 0, 0, 0, 4])
    blocks = list(range(packed.num_blocks))
    made.copy_adapter(packed, blocks)
    made.bind_slot(0, packed, blocks)
    made.bind_slot(1, packed, blocks)
    made.bind_blend(2, [(0, 0.25), (1, 0.75)])
    assert logprobs(made, 2) == pytest.approx(logprobs(made, 0), abs=1e-5)
    assert logprobs(made, 0) != pytest.approx(logprobs(made, None), abs=1e-2)
    made.bind_blend(2, [(0, 1.0), (1, -1.0)])
    assert logprobs(made, 2) == pytest.approx(logprobs(made, None), abs=1e-5)


def test_the_steps_keep_their_threads_whatever_others_ask_of_torch() -> None:
    """Torch gives a new thread the number that any thread last set."""
    made, before, seen = runner(TorchOps()), torch.get_num_threads(), []
    torch.set_num_threads(before + 1)
    try:
        steps(made)
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert seen == [before]


def test_the_warm_up_runs_every_kind_of_step() -> None:
    lengths, scaled = [], []

    class Seen(TorchOps):
        def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
            lengths.append(len(out))
            super().silu_mul(gate_up, out)

        def scale_output_(self, out: torch.Tensor, *rest: Any) -> None:
            scaled.append(len(out))
            super().scale_output_(out, *rest)

    warm = runner(Seen())
    plain = logprobs(warm, 0)
    lengths.clear()
    warm.warm_up()
    assert sorted(set(lengths)) == sorted(set(scaled)) == [1, 2, 65]
    assert logprobs(warm, 0) == plain
