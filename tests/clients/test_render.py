"""What reaches a terminal, a pipe and a program."""

import io
import json
import math
from datetime import UTC, datetime, timedelta

import pytest
from loraplex_client.render import (
    ago,
    human_bytes,
    one_line,
    printable,
    progress_bar,
    write,
    write_json,
    write_table,
)
from loraplex_client.values import TokenLogprobs, TopLogprob


class Screen(io.StringIO):
    """A terminal, as far as anybody asks."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nGrüße 你好 🙂", "plain\ttext\nGrüße 你好 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "[2J]0;title"),
        ("a\rb\x08c\x7f\x9b1m\x00", "abc1m"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    screen, pipe = Screen(), io.StringIO()
    write(text, screen)
    write(text, pipe)
    assert (screen.getvalue(), pipe.getvalue()) == (shown, text)


def test_one_line() -> None:
    assert one_line(" a\r\n\tb  c\x1b ") == "a b c"


def test_json_has_no_nan() -> None:
    out = io.StringIO()
    write_json(TokenLogprobs(-math.inf, (TopLogprob(1, math.nan), TopLogprob(2, -0.5))), out)
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue()) == {
        "logprob": None,
        "top": [{"token_id": 1, "logprob": None}, {"token_id": 2, "logprob": -0.5}],
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2_500_000, "2.4 MiB"),
        (5 << 30, "5.0 GiB"),
        (5 << 40, "5120.0 GiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "never"),
        (-3, "0 s ago"),  # their clock and ours
        (0.9, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (86_399, "23 h ago"),
        (10 * 86_400, "10 d ago"),
    ],
)
def test_ago(seconds: float | None, text: str) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert ago(None if seconds is None else now - timedelta(seconds=seconds), now) == text


def test_tables() -> None:
    rows = [("a", "1"), ("[bold]long\x1b", "2\n3")]
    pipe, screen = io.StringIO(), Screen()
    write_table(("NAME", "N"), rows, pipe)
    assert pipe.getvalue() == "NAME        N\na           1\n[bold]long  2 3\n"
    write_table(("NAME", "N"), rows, screen)
    assert "[bold]long" in screen.getvalue()
    assert "───" in screen.getvalue()


def test_a_table_that_a_terminal_would_cut_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("attention", "decode at a context of 1024 tokens", "4.2e-04", "ok")]
    pipe, screen = io.StringIO(), Screen()
    write_table(("KERNEL", "CASE", "ERROR", "VERDICT"), rows, pipe)
    write_table(("KERNEL", "CASE", "ERROR", "VERDICT"), rows, screen)
    assert screen.getvalue() == pipe.getvalue()


def test_a_progress_bar_is_for_terminals() -> None:
    pipe, screen = io.StringIO(), Screen()
    with progress_bar("uploading", pipe) as show:
        assert show is None
    with progress_bar("uploading [x]", screen) as show:
        assert show is not None
        show(0, 100)
        show(100, 100)
    assert pipe.getvalue() == ""
    assert "uploading [x]" in screen.getvalue()
