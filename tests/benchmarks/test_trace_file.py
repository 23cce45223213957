"""Workloads as files, and what is wrong with them."""

from pathlib import Path

import pytest
from trace_file import TraceError, TraceLine, read_trace, write_trace

GOOD = '{"timestamp": 1, "adapter": "a", "prompt_tokens": 4, "max_tokens": 2}'


def test_what_was_written_is_read(tmp_path: Path) -> None:
    lines = [
        TraceLine(0.0, None, 8, prompt_tokens=64),
        TraceLine(0.5, "a", 1, token_ids=(1, 2, 3), priority=-2),
        TraceLine(0.5, "b", 3, token_ids=(0,)),
    ]
    write_trace(tmp_path / "trace.jsonl", lines)

    assert read_trace(tmp_path / "trace.jsonl") == lines


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"when": 1}', "when: unknown; there are: timestamp, adapter"),
        ('{"max_tokens": 2, "prompt_tokens": 4}', "timestamp: nothing is not a number"),
        ('{"timestamp": NaN, "max_tokens": 2, "prompt_tokens": 4}', "timestamp: NaN is not"),
        ('{"timestamp": true, "max_tokens": 2, "prompt_tokens": 4}', "timestamp: true is not"),
        ('{"timestamp": 0, "max_tokens": 2, "prompt_tokens": 4}', "timestamp: earlier than"),
        ('{"timestamp": 1, "max_tokens": 2}', "prompt_tokens: either this or token_ids"),
        ('{"timestamp": 1, "prompt_tokens": 4}', "max_tokens: nothing is not a positive"),
        ('{"timestamp": 1, "prompt_tokens": 1.5, "max_tokens": 2}', "prompt_tokens: 1.5 is not"),
        ('{"timestamp": 1, "prompt_tokens": 4, "max_tokens": "2"}', 'max_tokens: "2" is not'),
        ('{"timestamp": 1, "token_ids": [], "max_tokens": 2}', "token_ids: not a list of token"),
        ('{"timestamp": 1, "token_ids": [-1], "max_tokens": 2}', "token_ids: not a list"),
        ('{"timestamp": 1, "adapter": 7, "prompt_tokens": 4, "max_tokens": 2}', "adapter: 7 is"),
    ],
)
def test_an_error_names_file_line_and_field(line: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")

    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:3: {why}")


def test_no_file_and_no_request(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none.jsonl: No such file"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")
