"""The engine says what transformers + PEFT says on the same dequantised NF4 weights.

In float32 that is the same logits and the same greedy tokens, alone and among others. In bfloat16
it is about as far from float32 as PEFT in bfloat16 is, and no further: both are given the tokens
that PEFT says in float32, so that all their logits compare.

One module, so that models and answers are shared by its tests and freed after them. The figures
are printed: `pytest -s`.
"""

from collections.abc import Callable

import pytest
from loraplex.engine.sequence import SamplingParams
from loraplex_kernels.segments import LONG_TILE_ROWS
from torch import Tensor

from tests.exactness.cases import Case, all_batches, all_cases, digest_of
from tests.exactness.compare import (
    CLEAR_GAP,
    TOLERANCE,
    Alone,
    Expected,
    Forced,
    PeftError,
    Prompts,
    compare_bfloat16,
    compare_float32,
    relative_error,
)
from tests.exactness.harness import Harness, Request
from tests.exactness.reference import Reference


def test_every_adapter_visibly_changes_the_output(
    adapted: Case, expected: Expected, of_base: Callable[[int], Tensor]
) -> None:
    base = of_base(adapted.text)
    change = relative_error(expected(adapted).logits[: len(base)], base)
    print(f"{adapted.name}: changes logits by {change:.0%} of the largest")
    assert change > 0.05


def test_alone_in_float32(case: Case, alone: Alone, expected: Expected) -> None:
    compare_float32(case, alone(case), expected(case))


def test_eight_at_once_in_float32(
    batch: list[Case], float32: Harness, expected: Expected, prompts: Prompts
) -> None:
    requests = [Request(case.adapter, prompts[case.text]) for case in batch]
    answers, steps = float32.run(requests, max_step_tokens=48)
    for case, answer in zip(batch, answers, strict=True):
        compare_float32(case, answer, expected(case))
    digests = {None if case.adapter is None else digest_of(case.adapter) for case in batch}
    assert any(set(step.digests) == digests and set(step.num_tokens) == {1} for step in steps), (
        "no step decoded for all adapters"
    )
    assert any(1 in step.num_tokens and max(step.num_tokens) > 1 for step in steps), (
        "no step held decode and prefill rows"
    )


def test_eight_at_once_with_the_ops_in_plain_torch(
    torch_ops: Harness, expected: Expected, prompts: Prompts
) -> None:
    batch = all_batches()[1]
    requests = [Request(case.adapter, prompts[case.text], max_tokens=5) for case in batch]
    answers, _ = torch_ops.run(requests)
    for case, answer in zip(batch, answers, strict=True):
        compare_float32(case, answer, expected(case))


def test_long_prompts(float32: Harness, reference: Reference, prompts: Prompts) -> None:
    """Long enough for the forms of the ops that take many rows of one adapter at a time."""
    cases = [case for case in all_cases() if case.name in ("rank 64", "patterns, rsLoRA")]
    prompt = [token for prompt in prompts for token in prompt] + prompts[0]
    requests = [Request(case.adapter, prompt, max_tokens=1) for case in cases]
    answers, steps = float32.run(requests)
    for case, answer in zip(cases, answers, strict=True):
        error = relative_error(answer.logits, reference.logits(case.adapter, prompt))
        print(f"{case.name}: relative logit error {error:.1e} over {len(prompt)} tokens")
        assert error < TOLERANCE
    assert max(max(step.num_tokens) for step in steps) > LONG_TILE_ROWS


@pytest.mark.parametrize("name", ["base", "rank 64", "example pirate"])
def test_alone_in_bfloat16(
    name: str, bfloat16: Harness, expected: Expected, forced: Forced, peft_error: PeftError
) -> None:
    [case] = [case for case in all_cases() if case.name == name]
    [answer], _ = bfloat16.run([forced(case)])
    compare_bfloat16(case, answer, expected(case), peft_error(case))


def test_eight_at_once_in_bfloat16(
    batch: list[Case], bfloat16: Harness, expected: Expected, forced: Forced, peft_error: PeftError
) -> None:
    answers, _ = bfloat16.run([forced(case) for case in batch], max_step_tokens=48)
    for case, answer in zip(batch, answers, strict=True):
        compare_bfloat16(case, answer, expected(case), peft_error(case))


def test_eight_at_once_from_the_dequantised_copy_in_bfloat16(
    dense: Harness, expected: Expected, forced: Forced, peft_error: PeftError
) -> None:
    batch = all_batches()[-1]
    answers, _ = dense.run([forced(case) for case in batch])
    for case, answer in zip(batch, answers, strict=True):
        compare_bfloat16(case, answer, expected(case), peft_error(case))


def test_few_positions_are_exempt_in_bfloat16(expected: Expected) -> None:
    gaps = [gap for case in all_cases() for gap in expected(case).gaps]
    exempt = sum(gap < CLEAR_GAP for gap in gaps)
    print(f"{exempt} of {len(gaps)} positions ({exempt / len(gaps):.0%}) have no clear token")
    assert exempt <= 0.2 * len(gaps)


def sampled(case: Case, prompts: Prompts, seed: int) -> Request:
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=seed)
    return Request(case.adapter, prompts[case.text], sampling=sampling, max_tokens=10)


def test_a_seed_draws_the_same_alone_and_among_eight(float32: Harness, prompts: Prompts) -> None:
    batch = enumerate(all_batches()[0])
    requests = [sampled(case, prompts, 1000 + index) for index, case in batch]
    mixed, _ = float32.run(requests, max_step_tokens=48)
    alone = [float32.run([request])[0][0] for request in requests[::2]]
    assert [answer.tokens for answer in mixed[::2]] == [answer.tokens for answer in alone]


def test_another_seed_draws_other_tokens(float32: Harness, prompts: Prompts) -> None:
    base = all_batches()[0][-1]
    seeds = (1, 2**63 - 1, 1, 2, 3)
    answers, _ = float32.run([sampled(base, prompts, seed) for seed in seeds])
    first, largest, again, *others = (answer.tokens for answer in answers)
    assert first == again
    assert len({tuple(tokens) for tokens in (first, largest, *others)}) == 4
