"""A greedy step's tokens are the largest of the whole head's logits, whatever the numbers."""

from pathlib import Path

import pytest
import torch
from loraplex.engine.batch import DeviceMemory, build_input
from loraplex.engine.draw import argmax
from loraplex.engine.model_runner import ModelRunner, RunnerConfig
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Drawn, Scheduled
from loraplex.model.config import ModelConfig, Rope
from loraplex.model.decoder import Activations, Decoder, DecoderInput, DecoderLayer
from loraplex.model.linear import Linear
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.native import NativeOps
from loraplex_kernels.nf4 import BaseWeight, NF4Weight
from loraplex_kernels.ops import Ops, Projection
from loraplex_kernels.tables import AdapterTables
from torch import Tensor

from tests.kernels.tiles import HAS_TILES
from tests.server.engine.tiny_llama import TinyLlama

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
BLOCK_TOKENS = 16
LEVELS = torch.linspace(-1.0, 1.0, 16)


def head_of(vocab: int, hidden: int, rng: torch.Generator) -> Tensor:
    """Equal rows and nearly equal ones, zeros, tiny numbers, and one that dwarfs its row.

    What lies behind it in memory would be chosen, if it were a part of it.
    """
    head = torch.randn(vocab, hidden, generator=rng).bfloat16()
    head[vocab - 2] = head[vocab // 2] = head[5]
    head[vocab - 3] = head[6]
    head[vocab - 3, 9] *= 1.01
    head[2] = 0.0
    head[3] *= 1e-30
    head[4, 7] = 100.0
    return torch.cat((head, 4 * head[-1:].repeat(32, 1)))[:vocab]


def embedding_of(head: Tensor, rng: torch.Generator) -> Tensor:
    """Rows near to those of the head; at the end not finite, tiny, zero, opposed to all."""
    noise = torch.randn(head.shape, generator=rng)
    rows = head.roll(1, dims=0).float() + 0.5 * noise
    rows[-1] = -head.float().sum(dim=0)
    rows[-2] = 0.0
    rows[-3] *= 1e-12
    rows[-4, 3] = torch.nan
    rows[-5, 8] = -torch.inf
    return rows.bfloat16()


def rounded_most(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A head, and a row for which one token's int8 weights are as wrong as they can be."""
    w = torch.randn(64, generator=rng).bfloat16().float()
    scale = w.abs().max() / 127
    error = w - scale * (w / scale).round()
    x = error.bfloat16()
    between = w @ x.float() - 0.3 * error @ x.float()  # of the logit and what int8 makes of it
    others = (between / x.float().abs().sum() * x.sign()).repeat(40, 1)
    others[20] = w
    return others.bfloat16(), x


def between_levels() -> tuple[Tensor, Tensor]:
    """A head, and a row of which the numbers' higher bytes say something else than their lower."""
    x = torch.full((192,), 350.0)
    x[0] = 32640.0
    others = torch.zeros(40, 192)
    others[:, 0] = 58000 / 32640
    others[20] = 1.0
    others[20, 0] = 0.0
    return others.bfloat16(), x.bfloat16()


class Head:
    """A decoder whose one layer adds nothing. `whole`: whether the last step wrote logits."""

    def __init__(self, head: Tensor, embedding: Tensor, scale: float, ops: Ops) -> None:
        vocab, hidden = head.shape
        config = ModelConfig(
            architecture="LlamaForCausalLM",
            hidden_size=hidden,
            intermediate_size=64,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=64,
            vocab_size=vocab,
            context_length=BLOCK_TOKENS,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            rope=Rope(10000.0),
        )
        layer = DecoderLayer(
            torch.ones(hidden),
            self._zero(hidden, 64, 64, 64),
            self._zero(64, hidden),
            torch.ones(hidden),
            self._zero(hidden, 64, 64),
            self._zero(64, hidden),
        )
        norm = torch.full((hidden,), scale)
        self._decoder = Decoder(config, embedding, [layer], norm, head, torch.bfloat16)
        self._ops = ops
        self._work = Activations.allocate(config, torch.bfloat16, CPU, 64, 64)
        self._cache = torch.zeros(64, 1, 2, 1, BLOCK_TOKENS, 64, dtype=torch.bfloat16)
        self.whole = False

    @staticmethod
    def _zero(width: int, *heights: int) -> Linear:
        total = sum(heights)
        codes = torch.zeros(total, width // 2, dtype=torch.uint8)
        weight = NF4Weight(codes, torch.zeros(total * width // 64), LEVELS)
        projections = tuple(
            Projection(index, sum(heights[:index]), height) for index, height in enumerate(heights)
        )
        return Linear(BaseWeight(weight, None), None, projections)

    def _input(self, token_ids: list[int]) -> DecoderInput:
        rows = []
        for index, token in enumerate(token_ids):
            sequence = Sequence(str(index), [token], GREEDY, StopParams(1), block_table=[index])
            rows.append(Scheduled(sequence, 0, 1, samples=True))
        arena = self._cache.view(torch.uint8).view(-1)
        tables = AdapterTables(1, 1, 7, 16, CPU)
        return build_input(
            rows, DeviceMemory(arena, torch.bfloat16, GranuleForm.ROWS, tables, BLOCK_TOKENS)
        )

    def expected(self, token_ids: list[int]) -> list[int]:
        step = self._input(token_ids)
        logits = self._decoder.forward(step, self._cache, self._ops, self._work)
        finite = logits.isfinite().all(dim=-1)
        return torch.where(finite, argmax(logits), -1).tolist()

    def tokens(self, token_ids: list[int]) -> list[int]:
        step = self._input(token_ids)
        assert self._decoder.chooses(step, self._ops)
        self._work.logits.fill_(torch.nan)
        tokens = self._decoder.choose(step, self._cache, self._ops, self._work).tolist()
        self.whole = not bool(self._work.logits.isnan().all())
        return tokens


class Whole(Decoder):
    """A decoder that always computes all logits."""

    def __init__(self, decoder: Decoder) -> None:
        self.__dict__.update(decoder.__dict__)

    def chooses(self, batch: DecoderInput, ops: Ops) -> bool:
        return False


def sequence(index: int, sampling: SamplingParams = GREEDY, min_tokens: int = 0) -> Sequence:
    stop = StopParams(9, min_tokens, frozenset(range(20)))
    return Sequence(str(index), [3 + index, 1, index], sampling, stop, block_table=[index])


def drawn_by(runner: ModelRunner) -> list[Drawn]:
    """Of greedy sequences, one of them with drafts, in some steps beside others that are not."""
    plain = [sequence(index) for index in range(4)]
    others = [
        sequence(4, SamplingParams(seed=3)),
        sequence(5, SamplingParams(temperature=0.0, num_logprobs=2)),
        sequence(6, SamplingParams(temperature=0.0, repetition_penalty=1.5)),
        sequence(7, min_tokens=9),
    ]
    drawn = []
    for step in range(6):
        rows = []
        for each in (*plain, *others) if step in (1, 2, 4) else plain:
            drafts = (7, 9) if each is plain[3] and step % 2 else ()
            start, each.num_computed = each.num_computed, each.num_tokens
            count = each.num_tokens - start + len(drafts)
            rows.append(Scheduled(each, start, count, True, drafts))
        for row, tokens in zip(rows, runner.run(rows), strict=True):
            row.sequence.output_token_ids.append(tokens[0].token_id)
            drawn.append(tokens)
    return drawn


if HAS_TILES:
    HAS_BYTE_TILES = " amx_int8" in Path("/proc/cpuinfo").read_text()

    @pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30, 1e38])
    @pytest.mark.parametrize(("vocab", "hidden"), [(48, 64), (2021, 192)])
    def test_as_all_logits_say(
        team_ops: NativeOps, vocab: int, hidden: int, scale: float, rng: torch.Generator
    ) -> None:
        head = head_of(vocab, hidden, rng)
        decoder = Head(head, embedding_of(head, rng), scale, team_ops)
        usual, odd = list(range(vocab - 5)), list(range(vocab - 5, vocab))
        for rows in (usual[5:6], usual[-17:], usual[:33], odd, [*usual[:20], *odd]):
            assert decoder.tokens(rows) == decoder.expected(rows)

    @pytest.mark.parametrize(
        ("rising", "near", "is_whole"), [(0, 0, False), (400, 300, False), (0, 3000, True)]
    )
    def test_more_candidates_than_a_list_holds(
        team_ops: NativeOps, rng: torch.Generator, rising: int, near: int, is_whole: bool
    ) -> None:
        """Those that are outbid make room; where too few are, all logits are computed."""
        row = torch.randn(192, generator=rng)
        below = torch.linspace(0.5, 0.99, rising)
        sizes = torch.cat((below, torch.full((near,), 0.998), torch.zeros(50)))
        sizes[rising + near // 3] = 1.0
        decoder = Head(
            (sizes[:, None] * row).bfloat16(), row.repeat(4000, 1).bfloat16(), 1.0, team_ops
        )
        assert decoder.tokens([1]) == [rising + near // 3]
        assert decoder.whole == (is_whole or not HAS_BYTE_TILES)

    def test_what_int8_alone_gets_wrong(team_ops: NativeOps, rng: torch.Generator) -> None:
        for head, row in (*(rounded_most(rng) for _ in range(20)), between_levels()):
            decoder = Head(head, row.repeat(40, 1), 1.0, team_ops)
            assert decoder.tokens([0]) == [20] == decoder.expected([0])

    def test_weights_that_are_not_finite(team_ops: NativeOps, rng: torch.Generator) -> None:
        head = torch.randn(100, 64, generator=rng).bfloat16()
        head[70, 3] = torch.nan
        decoder = Head(head, head, 1.0, team_ops)
        assert decoder.tokens([1, 2]) == [-1, -1]

    def test_the_runner_draws_the_same(team_ops: NativeOps) -> None:
        config = RunnerConfig(16, max_slots=1, max_rank=16, max_rows=80, max_running=16, device=CPU)
        decoder = TinyLlama(torch.bfloat16, 16, 1, is_packed=True).decoder
        runners = [ModelRunner(each, team_ops, config) for each in (decoder, Whole(decoder))]
        chosen, whole = map(drawn_by, runners)
        assert chosen == whole
