"""Stop strings are found wherever the text is cut, and nothing of one is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.model.stop import StopBuffer


@pytest.mark.parametrize(
    ("stops", "pieces", "sent", "matched"),
    [
        ([], ["ab", "c"], ["ab", "c"], None),
        (["END"], ["some ", "text"], ["some ", "text"], None),
        (["END"], ["a E", "N", "D b"], ["a ", "", ""], "END"),
        (["END"], ["a E", "N", "T"], ["a ", "", "ENT"], None),
        (["END"], ["aENDbEND"], ["a"], "END"),
        (["\n\n"], ["a\n", "\n"], ["a", ""], "\n\n"),
        (["abcd", "bc"], ["abcd"], ["a"], "bc"),
        (["abcd", "bc"], ["a", "b", "c"], ["", "", "a"], "bc"),
        (["bc", "abc"], ["xabc"], ["x"], "abc"),
        (["aab"], ["aa", "aab"], ["", "aa"], "aab"),
        (["🙂🙂"], ["a🙂", "b"], ["a", "🙂b"], None),
    ],
)
def test_push(stops: list[str], pieces: list[str], sent: list[str], matched: str | None) -> None:
    buffer = StopBuffer(stops)
    answers = [buffer.push(piece) for piece in pieces]
    assert [text for text, _ in answers] == sent
    assert [match for _, match in answers] == [None] * (len(pieces) - 1) + [matched]


def test_flush_gives_what_was_held_once() -> None:
    buffer = StopBuffer(["END"])
    assert buffer.push("the EN") == ("the ", None)
    assert buffer.flush() == "EN"
    assert buffer.flush() == ""


def test_nothing_is_left_after_a_match() -> None:
    buffer = StopBuffer(["END", "D!"])
    assert buffer.push("an END!") == ("an ", "END")
    assert buffer.flush() == ""


texts = st.text("ab\n", max_size=20)


@given(st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(texts, max_size=6))
def test_the_cut_does_not_matter(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = [
        (end, stop) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    expected_text, expected_match = text, None
    if ends:
        first = min(end for end, _ in ends)
        expected_match = max((stop for end, stop in ends if end == first), key=len)
        expected_text = text[: first - len(expected_match)]

    buffer = StopBuffer(stops)
    sent, matched = "", None
    for piece in pieces:
        part, matched = buffer.push(piece)
        sent += part
        assert expected_text.startswith(sent)
        if matched:
            break
    assert (sent + buffer.flush(), matched) == (expected_text, expected_match)
