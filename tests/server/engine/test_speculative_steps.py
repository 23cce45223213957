"""Drafts change how many tokens a step draws, never which: whoever makes them, however they fare.

The scheduler around a small random Llama in float32, beside the same requests without drafts.
"""

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import pytest
import torch
from loraplex.adapters.packing import PackedAdapter
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.model_runner import ModelRunner, RunnerConfig
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import FinishReason, Phase, SamplingParams, Sequence, StopParams
from loraplex.engine.speculation import PromptLookup, Speculator
from loraplex.engine.step import Step
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.tables import OutputScale
from loraplex_kernels.vocabulary import CutMatrix, Vocabulary, VocabularyLora

from tests.server.engine.tiny_llama import CONFIG, CPU, TinyLlama
from tests.server.engine.told import Guess, Told

VOCAB = CONFIG.vocab_size
PROMPT = [(7 * at + at * at // 5) % VOCAB for at in range(40)]
GREEDY = SamplingParams(temperature=0.0)
NUM_NEW = 30
MAX_DRAFTS = 5

Said = Mapping[str, list[int]]
Guessing = Callable[[Said], Guess]


TO_THE_END = StopParams(NUM_NEW)


@dataclass(frozen=True)
class Ask:
    sampling: SamplingParams = GREEDY
    adapter: str | None = None
    start: int = 0  # of an activated adapter
    num_prompt: int = 40
    stop: StopParams = TO_THE_END


KINDS = {
    "greedy": Ask(),
    "drawn": Ask(SamplingParams(1.2, seed=3)),
    "cut": Ask(SamplingParams(0.9, top_k=12, top_p=0.9, min_p=0.02, seed=4), "plain"),
    "penalties": Ask(replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.2), "plain"),
    "drawn penalties": Ask(
        SamplingParams(repetition_penalty=0.8, presence_penalty=-0.5, seed=5), "dora"
    ),
    "min_tokens": Ask(num_prompt=33, stop=StopParams(NUM_NEW, 20, frozenset(range(0, VOCAB, 3)))),
    "stop tokens": Ask(SamplingParams(seed=6), stop=StopParams(NUM_NEW, 0, frozenset({1, 7, 9}))),
    "logprobs": Ask(replace(GREEDY, num_logprobs=3), "vocabulary"),
    "activated": Ask(adapter="plain", start=31),
    "dora": Ask(adapter="dora", num_prompt=17),
    "vocabulary": Ask(SamplingParams(0.8, seed=7), "vocabulary", num_prompt=1),
}


class Serving:
    """Mutable: the arena's bytes, and what is counted."""

    def __init__(self, speculator: Speculator | None, num_blocks: int = 80) -> None:
        tiny = TinyLlama(torch.float32, 1, 1)
        self.packed = adapters(tiny)
        config = RunnerConfig(
            num_blocks, 4, 64, max_rows=96, max_running=11, device=CPU, max_drafts=60
        )
        self.runner = ModelRunner(tiny.decoder, TorchOps(), config)
        self.arena = Arena(num_blocks)
        pool = AdapterPool(self.arena, 4)
        limits = SchedulerConfig(tiny.block.tokens, 11, 96)
        self.scheduler = Scheduler(self.arena, pool, limits, speculator=speculator)
        self.said: dict[str, list[int]] = {}
        self.finishes: dict[str, FinishReason] = {}
        self.logprobs: dict[str, list[float]] = {}
        self.num_steps = self.num_preempted = 0

    def run(self, asks: Mapping[str, Ask]) -> dict[str, list[int]]:
        sequences = {name: sequence_of(name, ask) for name, ask in asks.items()}
        for sequence in sequences.values():
            self.scheduler.add(sequence)
        while any(sequence.phase is not Phase.FINISHED for sequence in sequences.values()):
            self.step()
        assert self.arena.count(Use.KV) == 0
        self.said = {name: sequence.output_token_ids for name, sequence in sequences.items()}
        return self.said

    def step(self) -> Step:
        step = self.scheduler.schedule(lambda version: self.packed[version].num_blocks, 0.0)
        assert not step.failed
        self.num_preempted += step.num_preempted
        self.num_steps += 1
        for load in step.loads:
            self.runner.copy_adapter(self.packed[load.digest], load.blocks)
            self.runner.bind_slot(load.slot, self.packed[load.digest], load.blocks)
            self.scheduler.loaded(load.digest, 0.0)
        if step.rows:
            for outcome in self.scheduler.update(step, self.runner.run(step.rows), 0.0):
                name = outcome.sequence.request_id
                of_drawn = [one.logprobs.logprob for one in outcome.drawn if one.logprobs]
                self.logprobs.setdefault(name, []).extend(of_drawn)
                if outcome.finish is not None:
                    self.finishes[name] = outcome.finish
        self.scheduler.check_integrity()
        return step


def adapters(tiny: TinyLlama) -> dict[str, PackedAdapter]:
    """An ordinary one, one that scales outputs, one on embedding and head."""
    plain, other = tiny.adapter((16,) * 7), tiny.adapter((8, 0, 24, 0, 0, 16, 0))
    size, hidden = plain.data.shape[1], CONFIG.hidden_size
    place = other.num_blocks * size

    def extended(values: torch.Tensor) -> torch.Tensor:
        block = torch.zeros(1, size, dtype=torch.uint8)
        block[0, : values.nbytes] = values.view(torch.uint8)
        return torch.cat([other.data, block])

    generator = torch.Generator().manual_seed(5)
    scales = 0.5 + torch.rand(hidden, generator=generator)
    matrices = torch.randn(4 * (VOCAB + hidden), generator=generator) / 2
    wide = CutMatrix(VOCAB, 4, VOCAB, (place,))
    narrow = CutMatrix(4, hidden, 4, (place + 4 * 4 * VOCAB,))
    update = (VocabularyLora(wide, narrow, 0.5),)
    return {
        "plain": plain,
        "dora": PackedAdapter(
            extended(scales), replace(other.contents, output_scales=(OutputScale(0, 3, place),))
        ),
        "vocabulary": PackedAdapter(
            extended(matrices), replace(other.contents, vocabulary=Vocabulary(update, update))
        ),
    }


def sequence_of(name: str, ask: Ask) -> Sequence:
    return Sequence(
        name,
        PROMPT[: ask.num_prompt],
        ask.sampling,
        ask.stop,
        ask.adapter,
        adapter_start=ask.start,
    )


@pytest.fixture(scope="module")
def plain() -> Serving:
    """Served without drafts."""
    serving = Serving(None)
    serving.run(KINDS)
    return serving


@pytest.fixture(scope="module")
def said(plain: Serving) -> dict[str, list[int]]:
    return plain.said


def right(said: Said) -> Guess:
    def guess(sequence: Sequence) -> Seq[int]:
        start = len(sequence.output_token_ids)
        return said[sequence.request_id][start : start + MAX_DRAFTS]

    return guess


def wrong(said: Said) -> Guess:
    return lambda sequence: [(token + 1) % VOCAB for token in right(said)(sequence)]


def random_part(said: Said) -> Guess:
    """Right up to a random place."""
    rng = random.Random(1)

    def guess(sequence: Sequence) -> Seq[int]:
        num_right = rng.randrange(MAX_DRAFTS + 1)
        after = [rng.randrange(VOCAB) for _ in range(rng.randrange(MAX_DRAFTS))]
        return [*right(said)(sequence)[:num_right], *after]

    return guess


def test_the_requests_say_different_things(said: dict[str, list[int]]) -> None:
    """So that the tests here see what is mixed up."""
    assert len({tuple(tokens) for tokens in said.values()}) == len(said)
    assert len(said["stop tokens"]) < NUM_NEW


@pytest.mark.parametrize(
    ("guess", "share"), [(right, (1.0, 1.0)), (wrong, (0.0, 0.0)), (random_part, (0.3, 0.9))]
)
def test_whoever_makes_the_drafts(
    guess: Guessing,
    share: tuple[float, float],
    plain: Serving,
    said: dict[str, list[int]],
) -> None:
    told = Told(guess(said))
    serving = Serving(told)
    assert serving.run(KINDS) == said
    assert serving.finishes == plain.finishes
    assert serving.logprobs["logprobs"] == pytest.approx(plain.logprobs["logprobs"], abs=1e-4)
    assert told.num_drafts > 200
    assert share[0] <= told.num_confirmed / told.num_drafts <= share[1]
    if guess is right:
        assert serving.num_steps < plain.num_steps / 2


def test_by_the_requests_own_text(plain: Serving, said: dict[str, list[int]]) -> None:
    serving = Serving(PromptLookup(max_rows=60, free_rows=1e9))
    assert serving.run(KINDS) == said
    assert serving.num_steps <= plain.num_steps


@pytest.mark.parametrize("guess", [wrong, random_part])
def test_memory_that_is_too_small(guess: Guessing, said: dict[str, list[int]]) -> None:
    """They give way to one another, drafts or not; but nobody for a draft."""
    asks = {name: ask for name, ask in KINDS.items() if ask.adapter is None}
    without, told = Serving(None, num_blocks=12), Told(guess(said))
    assert without.run(asks) == {name: said[name] for name in asks}
    serving = Serving(told, num_blocks=12)
    assert serving.run(asks) == {name: said[name] for name in asks}
    assert told.num_drafts > 50
    assert 0 < without.num_preempted >= serving.num_preempted


def test_one_that_is_aborted_between_its_steps(said: dict[str, list[int]]) -> None:
    serving = Serving(Told(right(said)))
    sequence = sequence_of("greedy", Ask())
    serving.scheduler.add(sequence)
    while len(sequence.output_token_ids) < 10:
        step = serving.step()
    assert step.rows[0].drafts
    serving.scheduler.abort(sequence)
    assert serving.arena.num_free == serving.arena.num_blocks
