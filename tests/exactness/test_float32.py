"""In float32 the engine says what PEFT says: the same logits, the same greedy tokens."""

from collections.abc import Callable, Sequence

from loraplex_kernels.native.ops import LONG_SEGMENT
from torch import Tensor

from tests.exactness.cases import Case, all_batches, all_cases, digest_of
from tests.exactness.harness import Answer, Harness, Request
from tests.exactness.reference import Continuation, Reference

TOLERANCE = 1e-4
"""Of max |logit|: how far a logit may be off. 2e-6 was measured; adapters in bf16 give 5e-4."""

NEAR_TIE = 1e-3
"""Of max |logit|: the gap below which the second most likely token may be said as well."""

Expected = Callable[[Case], Continuation]


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def compare(case: Case, answer: Answer, expected: Continuation, prompt: Sequence[int]) -> None:
    """Prompt logits all, then tokens up to the first that a near tie excuses; prints the error."""
    same = len(prompt)
    error = relative_error(answer.logits[:same], expected.logits[:same])
    nearly_tied = sum(gap < NEAR_TIE * expected.largest for gap in expected.gaps)
    print(f"{case.name}: relative logit error {error:.1e}, near ties {nearly_tied}")
    assert error < TOLERANCE
    for index, (ours, theirs) in enumerate(zip(answer.tokens, expected.tokens, strict=False)):
        if ours != theirs:
            assert expected.gaps[index] < NEAR_TIE * expected.largest, f"token {index}"
            return
    rows = len(answer.logits)
    assert relative_error(answer.logits, expected.logits[:rows]) < TOLERANCE


def test_every_adapter_visibly_changes_the_output(
    adapted: Case, reference: Reference, expected: Expected, prompts: list[list[int]]
) -> None:
    prompt = prompts[adapted.text]
    change = relative_error(
        expected(adapted).logits[: len(prompt)], reference.base_logits(tuple(prompt))
    )
    print(f"{adapted.name}: changes logits by {change:.0%} of the largest")
    assert change > 0.05


def test_alone(
    case: Case, alone: Callable[[Case], Answer], expected: Expected, prompts: list[list[int]]
) -> None:
    compare(case, alone(case), expected(case), prompts[case.text])


def test_eight_at_once(
    batch: list[Case], float32: Harness, expected: Expected, prompts: list[list[int]]
) -> None:
    requests = [Request(case.adapter, prompts[case.text]) for case in batch]
    answers, steps = float32.run(requests, max_step_tokens=48)
    for case, answer in zip(batch, answers, strict=True):
        compare(case, answer, expected(case), prompts[case.text])
    adapters = {case.adapter for case in batch}
    digests = {None if adapter is None else digest_of(adapter) for adapter in adapters}
    assert any(set(step.digests) == digests and set(step.num_tokens) == {1} for step in steps), (
        "no step decoded for all adapters"
    )
    assert any(1 in step.num_tokens and max(step.num_tokens) > 1 for step in steps), (
        "no step held decode and prefill rows"
    )


def test_eight_at_once_in_plain_torch(
    torch_ops: Harness, expected: Expected, prompts: list[list[int]]
) -> None:
    batch = all_batches()[0]
    requests = [Request(case.adapter, prompts[case.text], max_tokens=5) for case in batch]
    answers, _ = torch_ops.run(requests)
    for case, answer in zip(batch, answers, strict=True):
        compare(case, answer, expected(case), prompts[case.text])


def test_long_prompts(float32: Harness, reference: Reference, prompts: list[list[int]]) -> None:
    """Long enough for the forms of the ops that take many rows of one adapter at a time."""
    names = ("rank 64", "patterns, rsLoRA")
    cases = [case for case in all_cases() if case.name in names]
    prompt = [token for prompt in prompts for token in prompt] + prompts[0]
    requests = [Request(case.adapter, prompt, max_tokens=1) for case in cases]
    answers, steps = float32.run(requests)
    for case, answer in zip(cases, answers, strict=True):
        error = relative_error(answer.logits, reference.logits(case.adapter, prompt))
        print(f"{case.name}: relative logit error {error:.1e} over {len(prompt)} tokens")
        assert error < TOLERANCE
    assert max(max(step.num_tokens) for step in steps) > LONG_SEGMENT
