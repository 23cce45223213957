"""Tokens back to text, one at a time, at a constant cost a token.

Each token stands for some bytes, whatever surrounds it, except that SentencePiece's first token may
lose its leading space. So text is the concatenation of the tokens' bytes, read as UTF-8 as they
come. Where a byte-fallback run is broken, this gives one U+FFFD a broken sequence and keeps the
whole characters before it, while `tokenizers` turns every byte of the run into U+FFFD.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class TokenBytes:
    """What every token adds to the text; the cache is all that changes, idempotently."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_stripped = 0  # leading spaces that the decoder takes off the whole text
        self._tokenizer = tokenizer
        self._cache: dict[tuple[int, bool], bytes] = {}
        self._of_token: Callable[[str], bytes] | None = None  # None: ask the decoder itself
        steps = _decoder_steps(tokenizer)
        match [step["type"] for step in steps]:
            case ["ByteLevel"]:
                self._of_token = _byte_level
            case ["Replace", "ByteFallback", "Fuse"] if "String" in steps[0]["pattern"]:
                self._of_token = _sentencepiece(steps[0])
            case ["Replace", "ByteFallback", "Fuse", "Strip"] if (
                "String" in steps[0]["pattern"]
                and steps[3]["content"] == " "
                and not steps[3]["stop"]
            ):
                self._of_token = _sentencepiece(steps[0])
                self.num_stripped = steps[3]["start"]

    def get(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes of one token, the text's first or a later one; none for an unknown id."""
        key = (token_id, first)
        if key not in self._cache:
            self._cache[key] = self._compute(token_id, first)
        return self._cache[key]

    def _compute(self, token_id: int, first: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._of_token is not None:
            return self._of_token(token)
        alone = self._decode([token_id])
        if first:
            return alone.encode()
        # A token after itself shows what it adds in mid-text.
        return self._decode([token_id, token_id])[len(alone) :].encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_level(token: str) -> bytes:
    """An added token may hold characters that stand for no byte; it is then taken as it is."""
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:
        return token.encode()


def _sentencepiece(replace: dict[str, Any]) -> Callable[[str], bytes]:
    space: str = replace["pattern"]["String"]
    content: str = replace["content"]

    def convert(token: str) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(space, content).encode()

    return convert


class Detokenizer:
    """One sequence's text. Holds the bytes of an unfinished code point, at most three."""

    def __init__(
        self, token_bytes: TokenBytes, special_ids: frozenset[int], *, continues: bool = False
    ) -> None:
        self._token_bytes = token_bytes
        self._special_ids = special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = not continues
        self._num_to_strip = 0 if continues else token_bytes.num_stripped

    def push(self, token_ids: Iterable[int]) -> str:
        """The whole characters that these tokens complete; special tokens add nothing."""
        return "".join(self._push(i) for i in token_ids if i not in self._special_ids)

    def flush(self) -> str:
        """U+FFFD if the text ends within a code point."""
        return self._utf8.decode(b"", final=True)

    def _push(self, token_id: int) -> str:
        data = self._token_bytes.get(token_id, first=self._first)
        self._first = False
        while self._num_to_strip and data.startswith(b" "):
            data = data[1:]
            self._num_to_strip -= 1
        if data:
            self._num_to_strip = 0
        return self._utf8.decode(data)
