"""A seed gives the same tokens whatever else is in the batch; in float32 exactly."""

from loraplex.engine.sequence import SamplingParams

from tests.exactness.cases import Case, all_batches
from tests.exactness.harness import Harness, Request


def sampled(case: Case, prompts: list[list[int]], seed: int) -> Request:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=seed)
    return Request(case.adapter, prompts[case.text], sampling=sampling, max_tokens=10)


def test_a_seed_draws_the_same_alone_and_among_eight(
    float32: Harness, prompts: list[list[int]]
) -> None:
    requests = [sampled(case, prompts, 1000 + index) for index, case in enumerate(all_batches()[0])]
    mixed, _ = float32.run(requests, max_step_tokens=48)
    alone = [float32.run([request])[0][0] for request in requests[::2]]
    assert [answer.tokens for answer in mixed[::2]] == [answer.tokens for answer in alone]


def test_another_seed_draws_other_tokens(float32: Harness, prompts: list[list[int]]) -> None:
    base = all_batches()[0][-1]
    seeds = (1, 2**63 - 1, 1, 2, 3)
    answers, _ = float32.run([sampled(base, prompts, seed) for seed in seeds])
    first, largest, again, *others = (answer.tokens for answer in answers)
    assert first == again
    assert len({tuple(tokens) for tokens in (first, largest, *others)}) == 4
