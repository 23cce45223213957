"""What is drawn, with what probability: held to transformers' own processors and warpers."""

import math
from dataclasses import replace

import pytest
import torch
from loraplex.engine.draw import uniform_at
from loraplex.engine.sampler import confirm, is_greedy, sample
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Drawn, Scheduled
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPT = [3, 3, 8, 20]
OUTPUT = [5, 8, 5, 5]


def sequence(
    sampling: SamplingParams, output: list[int] | None = None, stop: StopParams | None = None
) -> Sequence:
    made = Sequence("r", PROMPT, sampling, stop or StopParams(100))
    made.output_token_ids = list(output or [])
    return made


def logits_of(vocab: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab, generator=generator) * spread


def draws(logits: Tensor, sequences: list[Sequence]) -> list[Drawn]:
    rows = [Scheduled(sequence, sequence.num_tokens - 1, 1, True) for sequence in sequences]
    return sample(logits.clone(), rows)


def tokens(logits: Tensor, sequences: list[Sequence]) -> list[int | None]:
    return [sampled.token_id for (sampled,) in draws(logits, sequences)]


def transformers_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Presence and frequency penalties are OpenAI's definition: transformers has neither."""
    scores = logits.clone()
    for token in set(OUTPUT):
        scores[token] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token)
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    processed: Tensor = processors(torch.tensor([[*PROMPT, *OUTPUT]]), scores[None])[0]
    return torch.softmax(processed.double(), -1)


@pytest.mark.parametrize(
    ("vocab", "spread", "params"),
    [
        pytest.param(50, 3.0, SamplingParams(), id="plain"),
        pytest.param(50, 3.0, SamplingParams(temperature=0.3), id="cold"),
        pytest.param(50, 3.0, SamplingParams(temperature=2.5), id="hot"),
        pytest.param(50, 3.0, SamplingParams(top_k=1), id="top_k=1"),
        pytest.param(50, 3.0, SamplingParams(top_k=7), id="top_k"),
        pytest.param(50, 3.0, SamplingParams(top_k=500), id="top_k over the vocabulary"),
        pytest.param(50, 3.0, SamplingParams(top_p=0.7), id="top_p"),
        pytest.param(50, 3.0, SamplingParams(top_p=1e-6), id="top_p of one"),
        pytest.param(50, 3.0, SamplingParams(min_p=0.1), id="min_p"),
        pytest.param(50, 3.0, SamplingParams(min_p=1.0), id="min_p=1"),
        pytest.param(50, 3.0, SamplingParams(repetition_penalty=1.8), id="repetition"),
        pytest.param(50, 3.0, SamplingParams(repetition_penalty=0.6), id="repetition wanted"),
        pytest.param(
            50, 1.0, SamplingParams(presence_penalty=1.5, frequency_penalty=-0.4), id="counts"
        ),
        pytest.param(
            50,
            2.0,
            SamplingParams(0.8, 0.9, 20, 0.02, repetition_penalty=1.2),
            id="all of them",
        ),
        # More tokens than are sorted at first.
        pytest.param(2000, 0.5, SamplingParams(top_p=0.95), id="wide top_p"),
        pytest.param(2000, 0.5, SamplingParams(top_k=600, top_p=0.8), id="wide top_k, top_p"),
        pytest.param(2000, 3.0, SamplingParams(top_p=0.5), id="narrow top_p"),
    ],
)
def test_as_transformers(vocab: int, spread: float, params: SamplingParams) -> None:
    """Every draw's uniform number falls into its token's share of the cumulated probabilities."""
    logits = logits_of(vocab, spread)
    probabilities = transformers_probabilities(logits, params)
    if params.top_k or params.top_p < 1.0:  # then the most likely token comes first
        order = probabilities.argsort(descending=True, stable=True)
    else:
        order = torch.arange(vocab)
    above = torch.zeros(vocab, dtype=torch.float64)
    above[order] = probabilities[order].cumsum(0)
    seeds = range(1000, 1400)
    rows = [sequence(replace(params, seed=seed), OUTPUT) for seed in seeds]
    drawn = tokens(logits.expand(len(rows), vocab), rows)
    for seed, token in zip(seeds, drawn, strict=True):
        assert token is not None
        assert probabilities[token] > 0, "a token that transformers filters out"
        uniform = uniform_at(seed, len(OUTPUT))
        assert above[token] - probabilities[token] - 1e-5 <= uniform <= above[token] + 1e-5
    assert {int(t) for t in (probabilities > 0.05).nonzero()} <= set(drawn)


def test_greedy_takes_the_best_after_the_penalties() -> None:
    logits = torch.zeros(3, 30)
    logits[:, 5], logits[:, 8], logits[:, 9] = 4.0, 3.5, 3.0
    penalised = [
        GREEDY,
        replace(GREEDY, frequency_penalty=0.3),  # token 5 stands in the output three times
        replace(GREEDY, repetition_penalty=1.5),
    ]
    assert tokens(logits, [sequence(params, OUTPUT) for params in penalised]) == [5, 8, 9]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_close_to_zero_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    params = SamplingParams(temperature, **filters)  # type: ignore[arg-type]
    logits = logits_of(400)
    best = int(logits.argmax())
    rows = [sequence(replace(params, seed=seed)) for seed in range(5)]
    assert tokens(logits.expand(5, -1), rows) == [best] * 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=3e38),
        SamplingParams(temperature=3e38, top_p=0.5),
        SamplingParams(repetition_penalty=1e-38, top_k=5),
        SamplingParams(repetition_penalty=3e38, min_p=0.5),
        SamplingParams(temperature=1e-45, repetition_penalty=1e-45, top_p=0.5, min_p=0.5),
    ],
)
def test_extremes_that_the_api_lets_through(params: SamplingParams) -> None:
    """A row draws one of its tokens, and its neighbour in the batch notices nothing."""
    logits = logits_of(400).expand(2, -1)
    extreme, neighbour = tokens(logits, [sequence(params, OUTPUT), sequence(GREEDY)])
    assert extreme is not None
    assert 0 <= extreme < 400
    assert neighbour == int(logits[1].argmax())


def test_a_seed_gives_its_tokens_whatever_else_is_in_the_batch() -> None:
    params = [
        SamplingParams(seed=11),
        SamplingParams(0.7, top_p=0.9, seed=12),
        SamplingParams(1.3, top_k=40, seed=13),
        GREEDY,
    ]
    logits = torch.stack([logits_of(300, seed=row) for row in range(4)])
    rows = [sequence(p, OUTPUT) for p in params]
    together = tokens(logits, rows)
    assert tokens(logits.flip(0), rows[::-1]) == together[::-1]
    alone = [tokens(logits[row : row + 1], [rows[row]])[0] for row in range(4)]
    assert alone == together


def test_a_seed_draws_anew_at_every_position() -> None:
    logits = torch.zeros(1, 1000)
    drawn = [
        tokens(logits, [sequence(SamplingParams(seed=5), [0] * position)])[0]
        for position in range(50)
    ]
    assert len(set(drawn)) > 40


def test_no_stop_token_before_min_tokens() -> None:
    logits = torch.zeros(4, 10)
    logits[:, 4], logits[:, 6], logits[:, 7] = 30.0, 29.0, 28.0
    stop = StopParams(100, min_tokens=3, stop_token_ids=frozenset({4, 6}))
    rows = [
        sequence(GREEDY, [1, 1], stop),
        sequence(SamplingParams(0.1, top_p=0.9), [1, 1], stop),
        sequence(GREEDY, [1, 1, 1], stop),
        sequence(GREEDY, [1, 1], replace(stop, stop_token_ids=frozenset())),
    ]
    assert tokens(logits, rows) == [7, 7, 4, 4]


def test_stop_tokens_may_be_all_there_are() -> None:
    stop = StopParams(100, min_tokens=3, stop_token_ids=frozenset(range(10)))
    logits = logits_of(10).expand(2, -1)
    rows = [sequence(SamplingParams(min_p=0.1, top_k=3), [], stop), sequence(GREEDY)]
    assert None not in tokens(logits, rows)


def test_logprobs_are_of_the_raw_logits() -> None:
    params = SamplingParams(0.2, top_k=2, repetition_penalty=2.0, num_logprobs=3)
    counts = [3, 0, None]
    logits = logits_of(60).expand(3, -1)
    raw = logits[0].double().log_softmax(-1)
    best = raw.topk(3)
    rows = [sequence(replace(params, num_logprobs=count), OUTPUT) for count in counts]
    (full,), (chosen_only,), (none,) = draws(logits, rows)
    assert full.logprobs is not None
    assert full.logprobs.logprob == pytest.approx(float(raw[full.token_id]), abs=1e-5)
    assert [token for token, _ in full.logprobs.top] == best.indices.tolist()
    assert [value for _, value in full.logprobs.top] == pytest.approx(best.values.tolist())
    assert chosen_only.logprobs is not None
    assert chosen_only.logprobs.logprob == full.logprobs.logprob
    assert chosen_only.logprobs.top == ()
    assert none.logprobs is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.9, num_logprobs=2)])
def test_rows_that_are_not_finite_fail_alone(bad: float, params: SamplingParams) -> None:
    logits = logits_of(300).repeat(3, 1)
    logits[1, 250] = bad
    first, sick, last = draws(logits, [sequence(params, OUTPUT) for _ in range(3)])
    assert sick == ()
    assert first[0].token_id == last[0].token_id


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ((4, 5, 6), [4, 5, 6, 7]),
        ((4, 5, 9), [4, 5, 6]),
        ((9, 5, 6), [4]),
        ((), [4]),
    ],
)
def test_drafts_count_up_to_one_that_was_not_drawn(
    drafts: tuple[int, ...], expected: list[int]
) -> None:
    logits = torch.zeros(2 + len(drafts), 30)
    for at in range(1 + len(drafts)):
        logits[at, 4 + at] = 5.0
    logits[-1, 20] = 5.0
    drafting, beside = sequence(GREEDY, OUTPUT), sequence(GREEDY, OUTPUT)
    rows = [Scheduled(drafting, 7, 1 + len(drafts), True, drafts), Scheduled(beside, 7, 1, True)]
    first, second = sample(logits, rows)
    assert [sampled.token_id for sampled in first] == expected
    assert [sampled.token_id for sampled in second] == [20]


def test_what_is_not_finite_behind_a_draft_is_left_to_its_own_step() -> None:
    logits = torch.zeros(3, 30)
    logits[:, 4] = 5.0
    logits[1, 3] = math.nan
    rows = [Scheduled(sequence(GREEDY, OUTPUT), 7, 3, True, (4, 4))]
    ((only,),) = sample(logits, rows)
    assert only.token_id == 4


@pytest.mark.parametrize(
    ("sampling", "stop", "expected"),
    [
        (GREEDY, StopParams(9), True),
        (GREEDY, StopParams(9, min_tokens=8), True),
        (GREEDY, StopParams(9, min_tokens=4, stop_token_ids=frozenset({2})), True),
        (GREEDY, StopParams(9, min_tokens=5, stop_token_ids=frozenset({2})), False),
        (SamplingParams(temperature=0.1), StopParams(9), False),
        (replace(GREEDY, presence_penalty=0.5), StopParams(9), False),
        (replace(GREEDY, num_logprobs=0), StopParams(9), False),
    ],
)
def test_what_is_greedy(sampling: SamplingParams, stop: StopParams, expected: bool) -> None:
    rows = [
        Scheduled(sequence(*each), 7, 1, True)
        for each in ((GREEDY, OUTPUT), (sampling, OUTPUT, stop))
    ]
    assert is_greedy(rows) == expected


def test_tokens_of_a_greedy_step() -> None:
    """With drafts: as many as were drawn. Not finite: none from there on."""
    rows = [
        Scheduled(sequence(GREEDY, OUTPUT), 7, 1 + len(drafts), True, drafts)
        for drafts in ((4, 5), (4, 6), (4, 4), ())
    ]
    drawn = confirm([4, 5, 6, 4, 5, 7, 4, -1, 8, -1], rows)
    assert [[each.token_id for each in row] for row in drawn] == [[4, 5, 6], [4, 5], [4], []]


def test_a_step_in_which_nobody_samples() -> None:
    assert sample(torch.zeros(0, 30), []) == []


def test_uniform_at_is_uniform() -> None:
    """Over seeds, over positions and over both at once: 16 buckets within 5 sigma."""
    num = 8000
    series = {
        "seeds": [uniform_at(seed, 0) for seed in range(num)],
        "positions": [uniform_at(2**63 - 1, position) for position in range(num)],
        "diagonal": [uniform_at(seed, seed) for seed in range(num)],
        "large": [uniform_at(2**64 - 1 - seed, 3) for seed in range(num)],
    }
    sigma = math.sqrt(num / 16)
    for name, numbers in series.items():
        counts = torch.histc(torch.tensor(numbers, dtype=torch.float64), 16, 0, 1)
        assert (counts - num / 16).abs().max() < 5 * sigma, name
        assert all(0 <= number < 1 for number in numbers)


@pytest.mark.parametrize(
    "step", [(0, 1), (1, 0), (1, 1), (1, -1), (2**32, 0), (0x9E3779B97F4A7C15, -1)]
)
def test_neighbours_are_unrelated(step: tuple[int, int]) -> None:
    num = 8000
    pairs = torch.tensor(
        [
            [uniform_at(seed, 10_000 + seed), uniform_at(seed + step[0], 10_000 + seed + step[1])]
            for seed in range(num)
        ],
        dtype=torch.float64,
    )
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 5 / math.sqrt(num)
