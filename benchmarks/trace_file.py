"""A workload as a file: one JSON object a line.

{"timestamp": 0.25, "adapter": "support-de", "prompt_tokens": 64, "max_tokens": 32}
{"timestamp": 0.31, "adapter": null, "token_ids": [1, 2, 3], "max_tokens": 8, "priority": 1}

timestamp      seconds, from whenever; the first line is due when the run starts
adapter        a name, null or absent for the bare base
prompt_tokens  a length, of a prompt made up from the seed; or
token_ids      the prompt itself
max_tokens     the answer is exactly so long
priority       optional, higher first
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("timestamp", "adapter", "prompt_tokens", "token_ids", "max_tokens", "priority")


class TraceError(Exception):
    """A line that cannot be replayed, with its file, its number and its field."""


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One request. Either `token_ids` or `prompt_tokens` says what its prompt is."""

    timestamp: float  # seconds
    adapter: str | None  # None: the bare base
    max_tokens: int
    prompt_tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    priority: int | None = None


def read_trace(path: Path) -> list[TraceLine]:
    """Timestamps count from the first line's; TraceError names the first line that is wrong."""
    lines: list[TraceLine] = []
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise TraceError(f"{path}: {why}") from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = _line_of(text)
            if lines and line.timestamp < lines[-1].timestamp:
                raise _Wrong("timestamp", "earlier than the line before")
        except _Wrong as wrong:
            raise TraceError(f"{path}:{number}: {wrong}") from None
        lines.append(line)
    if not lines:
        raise TraceError(f"{path} holds no request")
    return lines


def write_trace(path: Path, lines: Iterable[TraceLine]) -> None:
    """What `read_trace` reads."""
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            fields = {name: getattr(line, name) for name in FIELDS}
            kept = {name: value for name, value in fields.items() if value is not None}
            file.write(json.dumps(kept) + "\n")


class _Wrong(ValueError):
    def __init__(self, field: str | None, why: str) -> None:
        super().__init__(why if field is None else f"{field}: {why}")


def _line_of(text: str) -> TraceLine:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Wrong(None, f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _Wrong(None, "not a JSON object")
    for name in fields:
        if name not in FIELDS:
            raise _Wrong(name, f"unknown; there are: {', '.join(FIELDS)}")
    if ("prompt_tokens" in fields) == ("token_ids" in fields):
        raise _Wrong("prompt_tokens", "either this or token_ids is needed, and not both")
    return TraceLine(
        timestamp=_timestamp(fields),
        adapter=_adapter(fields),
        max_tokens=_whole(fields, "max_tokens", least=1),
        prompt_tokens=_whole(fields, "prompt_tokens", 1) if "prompt_tokens" in fields else None,
        token_ids=_token_ids(fields) if "token_ids" in fields else None,
        priority=_whole(fields, "priority", -(2**31)) if "priority" in fields else None,
    )


def _timestamp(fields: Mapping[str, Any]) -> float:
    value = fields.get("timestamp")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Wrong("timestamp", f"{_shown(fields, 'timestamp')} is not a number of seconds")
    return float(value)


def _adapter(fields: Mapping[str, Any]) -> str | None:
    value = fields.get("adapter")
    if value is not None and not isinstance(value, str):
        raise _Wrong("adapter", f"{json.dumps(value)} is neither a name nor null")
    return value or None


def _token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    value = fields["token_ids"]
    if not isinstance(value, list) or not value or not all(_is_whole(item, 0) for item in value):
        raise _Wrong("token_ids", "not a list of token ids, at least one")
    return tuple(value)


def _whole(fields: Mapping[str, Any], name: str, least: int) -> int:
    value: int = fields.get(name, "")
    if not _is_whole(value, least):
        kind = "a positive whole number" if least == 1 else "a whole number of 32 bits"
        raise _Wrong(name, f"{_shown(fields, name)} is not {kind}")
    return value


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "nothing"
