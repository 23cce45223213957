"""The prompts that drafts are measured on, and what is made of the figures."""

from speculative import (
    CLEAR_GAP,
    LIMIT,
    NO_LOSS,
    PROMPTS,
    Pass,
    _findings,
    first_difference,
    read_prompts,
)


def test_the_prompts_are_of_both_kinds() -> None:
    prompts = read_prompts(PROMPTS)
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    assert sum(prompt.repeats for prompt in prompts) >= 12
    assert sum(not prompt.repeats for prompt in prompts) >= 5
    words = [len(prompt.prompt.split()) for prompt in prompts if prompt.repeats]
    assert min(words) >= 50, "too short to be quoted"


def test_where_two_answers_part() -> None:
    assert first_difference((1, 2, 3), (1, 2, 3)) is None
    assert first_difference((1, 2, 3), (1, 5, 3)) == 1
    assert first_difference((1, 2), (1, 2, 3)) == 2


def passed(dtype: str, gap: float | None, rate: float) -> list[bool]:
    passes = {
        (1, repeats, name): [Pass(100, seconds, 50, 80, 50)]
        for repeats in (True, False)
        for name, seconds in (("off", 1.0), ("auto", 1.0 / rate))
    }
    differences = [] if gap is None else [("letter", 7, gap)]
    return [check.passed for check in _findings(dtype, 20, differences, passes).checks]


def test_what_passes() -> None:
    assert passed("bfloat16", None, LIMIT + 0.01) == [True, True, True]
    assert passed("bfloat16", None, LIMIT - 0.01) == [False, True, True]
    assert passed("bfloat16", None, NO_LOSS - 0.01) == [False, False, True]
    assert passed("bfloat16", CLEAR_GAP - 0.01, 2.0) == [True, True, True]
    assert passed("bfloat16", CLEAR_GAP, 2.0) == [True, True, False]
    assert passed("float32", 1e-6, 2.0) == [True, True, False]
