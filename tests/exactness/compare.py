"""What an answer of the engine may differ by from PEFT's. The figures are printed: `pytest -s`."""

from collections.abc import Callable

from torch import Tensor

from tests.exactness.cases import NUM_NEW, Case
from tests.exactness.harness import Answer, Request
from tests.exactness.reference import Continuation

Alone = Callable[[Case], Answer]
Expected = Callable[[Case], Continuation]
Forced = Callable[[Case], Request]
PeftError = Callable[[Case], float]
Prompts = list[list[int]]

TOLERANCE = 1e-4
"""Of max |logit|: how far a logit may be off in float32. 3e-6 was measured; were the adapters'
weights rounded to bf16, it would be 5e-4."""

NEAR_TIE = 1e-3
"""Of max |logit|: the gap below which the second most likely token may be said in float32."""

CLEAR_GAP = 0.25
"""From here on the most likely token must be the reference's in bfloat16, too."""


def relative_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def compare_float32(
    case: Case, answer: Answer, expected: Continuation, tolerance: float = TOLERANCE
) -> None:
    """Prompt logits, then tokens up to the first that a near tie excuses, then all logits."""
    num_rows = len(answer.logits)
    prompt = num_rows + 1 - len(answer.tokens)
    error = relative_error(answer.logits[:prompt], expected.logits[:prompt])
    ties = sum(gap < NEAR_TIE * expected.largest for gap in expected.gaps)
    print(f"{case.name}: relative logit error {error:.1e}, near ties {ties} of {NUM_NEW}")
    assert error < tolerance
    for index, (ours, theirs) in enumerate(zip(answer.tokens, expected.tokens, strict=False)):
        if ours != theirs:
            print(f"{case.name}: token {index} differs, the gap is {expected.gaps[index]:.1e}")
            assert expected.gaps[index] < NEAR_TIE * expected.largest
            return
    assert relative_error(answer.logits, expected.logits[:num_rows]) < tolerance


def compare_bfloat16(case: Case, answer: Answer, expected: Continuation, peft: float) -> None:
    ours = rms(answer.logits - expected.logits)
    print(f"{case.name}: RMS logit error {ours:.4f}, PEFT's {peft:.4f}, ratio {ours / peft:.2f}")
    assert ours <= 1.25 * peft
    chosen = answer.logits[-NUM_NEW:].argmax(-1).tolist()
    for index, (token, gap) in enumerate(zip(chosen, expected.gaps, strict=True)):
        assert token == expected.tokens[index] or gap < CLEAR_GAP, f"token {index}, gap {gap:.2f}"
