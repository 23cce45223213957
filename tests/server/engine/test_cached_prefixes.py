"""What is said after a prefix from the cache is what is said when all of it is computed.

The scheduler around a small random Llama in float32, with adapters that change what it says.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import pytest
import torch
from loraplex.adapters.packing import PackedAdapter
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.model_runner import ModelRunner, RunnerConfig
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import BlendPart, Phase, SamplingParams, Sequence, StopParams
from loraplex_kernels.reference import TorchOps

from tests.server.engine.tiny_llama import CPU, TinyLlama

GREEDY = SamplingParams(temperature=0.0, num_logprobs=0)
PROMPT = [(7 * at + at * at // 5) % 48 for at in range(70)]
NUM_NEW = 14
RANKS = {"a": (16, 16, 16, 16, 16, 16, 16), "b": (8, 0, 24, 0, 0, 16, 0)}


@dataclass(frozen=True)
class Ask:
    """A version, or several joined by "+", half of each; `start`: of an activated one."""

    adapter: str | None = None
    start: int = 0
    num_shared: int = 64  # of PROMPT, before what is its own
    own: tuple[int, ...] = (1, 2, 3)


class Serving:
    """Mutable: the arena's bytes, and `num_preempted`."""

    def __init__(self, prefix_cache: bool, num_blocks: int = 60) -> None:
        tiny = TinyLlama(torch.float32, 1, 1)
        config = RunnerConfig(num_blocks, 4, 64, max_rows=48, max_running=8, device=CPU)
        self.runner = ModelRunner(tiny.decoder, TorchOps(), config)
        self.packed: dict[str, PackedAdapter] = {v: tiny.adapter(r) for v, r in RANKS.items()}
        self.arena = Arena(num_blocks)
        limits = SchedulerConfig(tiny.block.tokens, 8, 48, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.arena, AdapterPool(self.arena, 4), limits)
        self.num_preempted = 0

    def run(self, *asks: Ask) -> list[Sequence]:
        """All at once, to their ends."""
        sequences = [sequence_of(f"r{index}", ask) for index, ask in enumerate(asks)]
        for sequence in sequences:
            self.scheduler.add(sequence)
        while any(sequence.phase is not Phase.FINISHED for sequence in sequences):
            self.step()
        assert self.arena.count(Use.KV) == 0
        return sequences

    def step(self) -> None:
        step = self.scheduler.schedule(lambda version: self.packed[version].num_blocks, 0.0)
        assert not step.failed
        self.num_preempted += step.num_preempted
        for load in step.loads:
            self.runner.copy_adapter(self.packed[load.digest], load.blocks)
            self.runner.bind_slot(load.slot, self.packed[load.digest], load.blocks)
            self.scheduler.loaded(load.digest, 0.0)
        for bind in step.binds:
            self.runner.bind_blend(bind.slot, bind.members)
        if step.rows:
            self.scheduler.update(step, self.runner.run(step.rows), 0.0)
        self.scheduler.check_integrity()


def sequence_of(request_id: str, ask: Ask) -> Sequence:
    parts = ask.adapter.split("+") if ask.adapter and "+" in ask.adapter else []
    blend = tuple(BlendPart(version, 0.5) for version in parts)
    prompt = [*PROMPT[: ask.num_shared], *ask.own]
    sequence = Sequence(request_id, prompt, GREEDY, StopParams(NUM_NEW), ask.adapter, blend=blend)
    sequence.adapter_start = ask.start
    return sequence


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Which is quicker for so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> dict[Ask, list[int]]:
    """What each says in memory of its own, everything computed. Filled as it is asked for."""
    return {}


def said_alone(alone: dict[Ask, list[int]], ask: Ask) -> list[int]:
    if ask not in alone:
        (sequence,) = Serving(prefix_cache=False).run(ask)
        assert sequence.num_cached == 0
        alone[ask] = sequence.output_token_ids
    return alone[ask]


@pytest.mark.parametrize(
    ("asks", "num_cached"),
    [
        ([Ask(), Ask(own=(9,)), Ask(own=())], [0, 64, 48]),
        ([Ask("a"), Ask("a", own=(9, 9))], [0, 64]),
        ([Ask("a+b"), Ask("a+b", own=(9,)), Ask("a"), Ask("b")], [0, 64, 0, 0]),
        ([Ask("a"), Ask("b"), Ask(), Ask("b"), Ask("a")], [0, 0, 0, 64, 64]),
        # Activated: at a block's edge, inside a block, and the base after them.
        ([Ask(), Ask("a", start=64), Ask("a", start=50), Ask("b", start=50)], [0, 64, 48, 48]),
        ([Ask("a", start=50), Ask("a", start=50, own=(4,)), Ask()], [0, 64, 48]),
    ],
)
def test_one_after_another(
    asks: Seq[Ask], num_cached: Seq[int], alone: dict[Ask, list[int]]
) -> None:
    serving = Serving(prefix_cache=True)
    for ask, expected in zip(asks, num_cached, strict=True):
        (sequence,) = serving.run(ask)
        assert sequence.output_token_ids == said_alone(alone, ask)
        assert sequence.num_cached == expected


def test_adapters_and_prefixes_change_what_is_said(alone: dict[Ask, list[int]]) -> None:
    """So that the tests here see what is mixed up."""
    asks = [Ask(), Ask("a"), Ask("b"), Ask("a+b"), Ask("a", start=50), Ask("a", start=64)]
    assert len({tuple(said_alone(alone, ask)) for ask in asks}) == len(asks)


def test_the_next_turn_goes_on_from_what_was_generated(alone: dict[Ask, list[int]]) -> None:
    serving = Serving(prefix_cache=True)
    first = Ask("a")
    serving.run(first)
    second = Ask("a", own=(*first.own, *said_alone(alone, first), 5, 6))
    (sequence,) = serving.run(second)
    assert sequence.num_cached == 80  # of 64 + 3 + 14, but for the last drawn
    assert sequence.output_token_ids == said_alone(alone, second)


def test_many_at_once_in_memory_that_is_too_small(alone: dict[Ask, list[int]]) -> None:
    """They share, follow one another, give way to one another and find their blocks again."""
    serving = Serving(prefix_cache=True, num_blocks=25)
    asks = [
        Ask(adapter, start, own=(own,) * 12)
        for own in (1, 9)
        for adapter, start in [(None, 0), ("a", 0), ("b", 50), ("b", 0), (None, 0), ("a", 50)]
    ]
    for sequence, ask in zip(serving.run(*asks), asks, strict=True):
        assert sequence.output_token_ids == said_alone(alone, ask)
    assert serving.num_preempted
    assert serving.scheduler.kv.stats.num_found > 200
