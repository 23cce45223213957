"""Text assembled from tokens is the same however the tokens were grouped."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st
from loraplex.api.completion import Completion
from loraplex.engine.sequence import StopParams, Tokens

from tests.server.api.conftest import EOS, SPECIAL, FakeDetokenizer

TEXTS = st.text(alphabet="abé\N{SNOWMAN}", max_size=12)


def run(
    token_ids: list[int], sizes: list[int], stops: list[str], min_tokens: int
) -> tuple[str, list[int], str | None]:
    """Text, delivered ids and match, with the tokens pushed in groups of these sizes."""
    stop = StopParams(100, min_tokens, frozenset({EOS}))
    completion = Completion(FakeDetokenizer(), stop, stops)
    text, at = "", 0
    delivered: list[int] = []
    for end in [*accumulate(sizes), len(token_ids)]:
        if completion.matched is None and at < len(token_ids):
            delta = completion.push(Tokens(tuple(token_ids[at:end])))
            text, at = text + delta.text, max(at, end)
            delivered += delta.token_ids
    if completion.matched is None:
        text += completion.flush()
    assert completion.num_tokens == len(delivered)
    return text, delivered, completion.matched


@given(
    TEXTS,
    st.lists(st.integers(0, 4), max_size=8),
    st.lists(st.text("abé", min_size=1, max_size=3), max_size=3),
    st.integers(0, 6),
)
def test_groups_do_not_matter(
    text: str, sizes: list[int], stops: list[str], min_tokens: int
) -> None:
    ids = [*text.encode(), EOS]
    assert run(ids, sizes, stops, min_tokens) == run(ids, [1] * len(ids), stops, min_tokens)


@given(TEXTS, st.lists(st.text("abé", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_where_its_first_stop_string_begins(text: str, stops: list[str]) -> None:
    found, _, matched = run([*text.encode(), SPECIAL], [], stops, 0)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert (matched is not None) == bool(ends)
    if matched is None:
        assert found == text
    else:
        assert found + matched == text[: min(ends)]
