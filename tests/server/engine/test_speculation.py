"""What is guessed from a text, and which guesses pay."""

import gc
import random
from functools import partial

import pytest
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena
from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.speculation import (
    FREE_ROWS,
    LONGEST_MATCH,
    Experience,
    PromptLookup,
    RowCost,
    Text,
)
from loraplex.engine.step import Scheduled

BLOCK_TOKENS = 4


def text(tokens: str) -> Text:
    made = Text()
    made.extend([ord(token) for token in tokens])
    return made


def guessed(tokens: str, limit: int = 4) -> tuple[int, str]:
    length, guess = text(tokens).guess(limit)
    return length, "".join(map(chr, guess))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("", (0, "")),
        ("a", (0, "")),
        ("abcd", (0, "")),
        ("abcdefgab", (2, "cdef")),
        ("abxcbycab", (2, "xcby")),  # the longest match, though "b" alone stood later
        ("abxcabyc.ab", (2, "yc.a")),  # the latest of those
        ("xaya", (1, "yaya")),
        ("aaa", (2, "aaaa")),  # in circles, as far as it is asked for
        ("abcabcab", (5, "cabc")),
        ("0123456789_0123456789", (LONGEST_MATCH, "_012")),
    ],
)
def test_what_followed_the_last_tokens_before(tokens: str, expected: tuple[int, str]) -> None:
    assert guessed(tokens) == expected


def test_a_text_that_grows_by_pieces_is_one() -> None:
    rng = random.Random(0)
    for _ in range(50):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 60))]
        whole, grown = Text(), Text()
        whole.extend(tokens)
        cut = rng.randrange(len(tokens) + 1)
        grown.extend(tokens[:cut])
        grown.extend(tokens[cut:])
        assert len(grown) == len(tokens)
        assert grown.guess(6) == whole.guess(6)


def test_experience_wins_over_the_prior_and_fades() -> None:
    told = Experience(0.5, 0.5)
    assert told.probability == 0.5
    for _ in range(10):
        told.learn(num_drafts=4, num_right=4)
    assert told.probability > 0.9
    for _ in range(20):
        told.learn(num_drafts=4, num_right=0)
    assert told.probability < 0.15
    for _ in range(600):
        told.forget()
    assert told.probability == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("free_rows", [4.0, 16.0, 60.0])
def test_what_a_row_costs_is_learnt_from_the_steps(free_rows: float) -> None:
    rng = random.Random(2)

    def step(cost: RowCost, num_rows: int) -> None:
        slow = 20.0 if rng.random() < 0.05 else rng.uniform(0.9, 1.1)
        cost.learn(num_rows, 0.001 * (free_rows + num_rows) * slow)

    alone, many = RowCost(), RowCost()
    assert alone.free_rows == FREE_ROWS
    for _ in range(400):
        step(alone, rng.choice([1, 1, 3, 9]))
        step(many, rng.choice([30, 32, 40]))
    assert alone.free_rows == pytest.approx(free_rows, rel=0.3)
    assert many.free_rows == pytest.approx(free_rows, rel=0.5)


def test_steps_that_are_all_alike_say_nothing_of_it() -> None:
    cost = RowCost()
    for _ in range(100):
        cost.learn(8, 0.02)
    assert cost.free_rows == pytest.approx(FREE_ROWS)


def decoding(tokens: str, max_tokens: int = 50) -> Scheduled:
    """Its last token is about to run, and more tokens fit in the block only by chance."""
    prompt = [ord(token) for token in tokens[:-1]]
    sequence = Sequence("r", prompt, SamplingParams(), StopParams(max_tokens))
    sequence.output_token_ids = [ord(tokens[-1])]
    sequence.num_computed = len(prompt)
    return Scheduled(sequence, len(prompt), 1, True)


class Memory:
    """Blocks for the rows' tokens, and so many more."""

    def __init__(self, rows: list[Scheduled], num_free: int) -> None:
        sizes = [-(-row.sequence.num_tokens // BLOCK_TOKENS) for row in rows]
        arena = Arena(sum(sizes) + num_free)
        self.kv = KVMemory(arena, AdapterPool(arena, 1), BLOCK_TOKENS)
        for row in rows:
            assert self.kv.grow(row.sequence, row.sequence.num_tokens) == ()


def extended(
    lookup: PromptLookup, rows: list[Scheduled], budget: int = 100, num_free: int = 100
) -> list[str]:
    made = lookup.extend(rows, budget, len(rows), Memory(rows, num_free).kv)
    for before, after in zip(rows, made, strict=True):
        assert after.num_tokens == before.num_tokens + len(after.drafts)
        assert (after.sequence, after.start, after.samples) == (before.sequence, before.start, True)
        needed = -(-(after.start + after.num_tokens) // BLOCK_TOKENS)
        assert len(after.sequence.block_table) >= needed
    return ["".join(map(chr, row.drafts)) for row in made]


QUOTE = "0123456789_012"
BOLD = partial(PromptLookup, free_rows=64)


def test_one_alone_is_guessed_for_boldly() -> None:
    assert extended(BOLD(), [decoding(QUOTE)]) == ["3456789_"]
    assert extended(BOLD(max_drafts=3), [decoding(QUOTE)]) == ["345"]
    assert extended(PromptLookup(), [decoding("no two alike!"[:4])]) == [""]


@pytest.mark.parametrize(("left", "drafts"), [(1, ""), (2, "3"), (4, "345")])
def test_no_more_than_is_left_to_draw(left: int, drafts: str) -> None:
    assert extended(BOLD(), [decoding(QUOTE, max_tokens=1 + left)]) == [drafts]


def test_only_what_the_step_leaves_over() -> None:
    assert extended(BOLD(), [decoding(QUOTE)], budget=2) == ["34"]
    assert extended(BOLD(), [decoding(QUOTE)], budget=0) == [""]
    assert extended(PromptLookup(max_rows=1), [decoding(QUOTE)]) == ["3"]
    # 14 tokens lie in 4 blocks, with place for two more; one block is left to each that runs.
    assert extended(BOLD(), [decoding(QUOTE)], num_free=1) == [""]
    assert extended(PromptLookup(max_drafts=2), [decoding(QUOTE)], num_free=0) == ["34"]
    assert extended(BOLD(), [decoding(QUOTE)], num_free=3) == ["3456789_"]


def test_beside_many_others_only_what_is_likely() -> None:
    """The longer match is the likelier one; with still more beside it, none pays."""
    rows = [decoding(QUOTE), decoding("0123456789_0"), *(decoding("ab") for _ in range(44))]
    drafts = extended(PromptLookup(free_rows=64), rows)
    assert 1 <= len(drafts[0]) < 8
    assert drafts[1:] == [""] * 45
    assert extended(PromptLookup(free_rows=4), rows) == [""] * 46


def test_a_prompt_is_not_guessed_on() -> None:
    prefill = decoding(QUOTE)
    prefill = Scheduled(prefill.sequence, prefill.start - 2, 3, True)
    assert extended(PromptLookup(), [prefill]) == [""]


def test_what_was_wrong_is_given_up_and_tried_again() -> None:
    lookup, row = PromptLookup(free_rows=8), decoding(QUOTE)
    kv = Memory([row], 9).kv
    numbers = []
    for _ in range(60):
        (made,) = lookup.extend([row], 100, 1, kv)
        numbers.append(len(made.drafts))
        if made.drafts:
            lookup.learn(made, 0)
    assert numbers[0] > 4
    assert numbers[20:].count(0) > 25
    assert any(numbers[20:])


def test_nothing_is_kept_of_those_that_are_gone() -> None:
    lookup = PromptLookup()
    extended(lookup, [decoding(QUOTE)])
    gc.collect()
    assert len(lookup) == 0
