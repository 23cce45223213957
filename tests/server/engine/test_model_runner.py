"""The runner's steps: eager, replayed, and those before the first request."""

import torch
from loraplex.engine.batch import DeviceMemory
from loraplex.engine.graphs import DecodeGraphs, DecodeInputs, Forward
from loraplex.engine.model_runner import ModelRunner, RunnerConfig
from loraplex.engine.scheduler import Scheduled
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.model.loader import Progress
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.ops import TritonOps
from loraplex_kernels.gpu.paths import UNMEASURED
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps

from tests.server.engine.lazy_streams import LazyCopyStream, LazyDevice
from tests.server.engine.recorded_graphs import Recorder
from tests.server.engine.tiny_llama import CPU, MAX_ROWS, TinyLlama

CONFIG = RunnerConfig(
    num_blocks=16, max_slots=1, max_rank=16, max_rows=80, max_running=MAX_ROWS, device=CPU
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
        for sequence, sampled in zip(sequences, runner.run(rows), strict=True):
            assert sampled.token_id is not None
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


def test_the_warm_up_runs_every_kind_of_step() -> None:
    lengths = []

    class Seen(TorchOps):
        def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
            lengths.append(len(out))
            super().silu_mul(gate_up, out)

    runner(Seen()).warm_up()
    assert sorted(set(lengths)) == [1, 2, 65]
