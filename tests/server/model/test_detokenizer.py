"""Incremental text equals the whole sequence's, for the decoders that decoder models use."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.model.detokenizer import Detokenizer, TokenBytes
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

END = "<|end|>"
SPACE = "▁"
WORDS = "the a is an un ing hello world 🙂 日本"


def byte_level() -> Tokenizer:
    """Every byte is a token, and a few merges split characters between tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "h"), ("h", "e"), ("ð", "Ł"), ("Ġ", "ð"), ("Ã", "©")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool call é>", special=False)])
    return tokenizer


def byte_fallback(strip: bool) -> Tokenizer:
    """Llama 2's and Mistral's decoder, or without the strip Gemma's."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [SPACE, *"abcdefghijklmnopqrstuvwxyz.", f"{SPACE}a", f"{SPACE}{SPACE}", "in"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(SPACE, "a"), (SPACE, SPACE), ("i", "n")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    prefix = [normalizers.Prepend(SPACE)] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strips = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence([*steps, *strips])
    return tokenizer


def metaspace() -> Tokenizer:
    """A decoder that the detokenizer has no table for, and asks."""
    tokens = ["<unk>", SPACE, *(f"{SPACE}{word}" for word in WORDS.split()), *"abcdehilnorw."]
    tokenizer = Tokenizer(models.Unigram([(token, -float(len(tokens))) for token in tokens], 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte fallback, strip": byte_fallback(strip=True),
    "byte fallback": byte_fallback(strip=False),
    "metaspace": metaspace(),
}
for each in TOKENIZERS.values():
    each.add_special_tokens([END])
by_decoder = pytest.mark.parametrize("name", TOKENIZERS)


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def detokenizer_of(tokenizer: Tokenizer, *, continues: bool = False) -> Detokenizer:
    special = frozenset({id_of(tokenizer, END)})
    return Detokenizer(TokenBytes(tokenizer), special, continues=continues)


def pieces_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push([token_id]) for token_id in token_ids), detokenizer.flush()]


@by_decoder
@given(data=st.data())
def test_pieces_join_to_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    alphabet = sorted(set(WORDS)) if name == "metaspace" else st.characters(codec="utf-8")
    text = data.draw(st.text(alphabet, max_size=30))
    token_ids = tokenizer.encode(text).ids
    end = data.draw(st.integers(0, len(token_ids)))
    token_ids.insert(end, id_of(tokenizer, END))
    pieces = pieces_of(detokenizer_of(tokenizer), token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=True)
    if name != "metaspace":
        assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


@given(st.lists(st.integers(0, TOKENIZERS["byte-level"].get_vocab_size() + 3), max_size=30))
def test_any_bytes_of_a_byte_level_model(token_ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    text = "".join(pieces_of(detokenizer_of(tokenizer), token_ids))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
def test_a_code_point_is_never_split(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer.encode("👩‍👩‍👧é").ids
    pieces = [piece for piece in pieces_of(detokenizer_of(tokenizer), token_ids) if piece]
    assert pieces == list("👩‍👩‍👧é")


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["<0xE2>", "<0x82>", "a"], ["", "", "\ufffda", ""]),
        (["<0xF0>", "<0x9F>"], ["", "", "\ufffd"]),
        (["<0xFF>", "a"], ["\ufffd", "a", ""]),
        (["<0xC3>", END, "<0xA9>"], ["", "", "é", ""]),
    ],
)
def test_broken_bytes(tokens: list[str], pieces: list[str]) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    token_ids = [id_of(tokenizer, token) for token in tokens]
    assert pieces_of(detokenizer_of(tokenizer), token_ids) == pieces


@pytest.mark.parametrize(
    ("tokens", "continues", "text"),
    [
        ([f"{SPACE}a", f"{SPACE}a"], False, "a a"),
        ([f"{SPACE}a", f"{SPACE}a"], True, " a a"),
        ([f"{SPACE}{SPACE}", f"{SPACE}a"], False, "  a"),
        ([END, f"{SPACE}a"], False, "a"),
        (["in", f"{SPACE}a"], False, "in a"),
        (["<0x20>", "a"], False, "a"),
    ],
)
def test_the_leading_space(tokens: list[str], continues: bool, text: str) -> None:
    tokenizer = TOKENIZERS["byte fallback, strip"]
    token_ids = [id_of(tokenizer, token) for token in tokens]
    detokenizer = detokenizer_of(tokenizer, continues=continues)
    assert detokenizer.push(token_ids) == text


def test_token_bytes() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    token_bytes = TokenBytes(tokenizer)
    for token, expected in {
        "Ġh": b" h",
        "ðŁ": b"\xf0\x9f",
        "<tool call é>": b"<tool call \xc3\xa9>",
    }.items():
        assert token_bytes.get(id_of(tokenizer, token)) == expected
    assert token_bytes.get(10**6) == b""
