"""A tokenizer encodes and decodes as transformers' does from the same folder."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loraplex.errors import InvalidRequestError, ModelError
from loraplex.model.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT = [{"role": "user", "content": "Hello 12 👩‍👩‍👧 <|im_end|>"}]
TEXTS = [
    "",
    "hello",
    " hello  12345\n\n",
    "naïve 👩‍👩‍👧‍👦 日本",
    "<|im_start|>x<|im_end|>",
    "\x00\ufffd",
]


def write_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "he", "ll", "Ġhe"])}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "he")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"},
        "chat_template": CHATML + PROMPT,
        **(config or {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert token_ids == reference(text, truncation=False, padding=False)["input_ids"]
    assert tokenizer.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_encode_chat(tokenizer: Tokenizer, reference: Any, add_generation_prompt: bool) -> None:
    token_ids = tokenizer.encode_chat(CHAT, None, {}, add_generation_prompt)
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt)
    assert token_ids == expected["input_ids"]
    assert token_ids[0] == reference.convert_tokens_to_ids("<|im_start|>")


def test_special_tokens_and_bytes(tokenizer: Tokenizer, reference: Any) -> None:
    names = ["<s>", "<|im_start|>", "<|im_end|>"]
    special = {i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)}
    assert special == set(reference.convert_tokens_to_ids(names))
    assert tokenizer.vocab_size == max(special) + 1
    assert tokenizer.token_bytes(reference.convert_tokens_to_ids("Ġhe")) == b" he"
    assert tokenizer.token_bytes(reference.eos_token_id) == b"<|im_end|>"


def test_a_detokenizer_is_a_sequences_own(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.detokenizer(), tokenizer.detokenizer()
    broken, whole = tokenizer.encode("é")[1:], tokenizer.encode("a")
    assert first.push(broken[:1]) == ""
    assert second.push(whole) == "a"
    assert first.push(broken[1:]) == "é"


def test_many_threads_share_one(tokenizer: Tokenizer) -> None:
    def round_trip(number: int) -> str:
        tokenizer.encode_chat(CHAT)
        return tokenizer.decode(tokenizer.encode(f"thread {number} 👋"))

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(round_trip, range(200)))
    assert texts == [f"thread {number} 👋" for number in range(200)]


def test_a_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_chat([{"role": "user", "content": "he"}]) == tokenizer.encode("he")
    assert tokenizer.decode(tokenizer.encode_chat(CHAT, [1])) == "[1]"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == "d"
    assert tokenizer.decode(tokenizer.encode_chat(CHAT, [])) == "t"


def test_without_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"chat_template": None}))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat(CHAT)


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud83d"}])


def test_tokens_that_the_config_alone_declares(tmp_path: Path) -> None:
    declared = {"262": {"content": "<tool>", "special": False, "normalized": False}}
    config = {"added_tokens_decoder": declared, "pad_token": "<pad>"}
    tokenizer = Tokenizer.load(write_folder(tmp_path, config))
    ids = tokenizer.encode("<tool><pad>")[1:]
    assert ids == [262, 263]
    assert tokenizer.decode(ids) == "<tool>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": [{}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
    ],
)
def test_a_broken_folder(tmp_path: Path, name: str, content: str | None) -> None:
    folder = write_folder(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        Tokenizer.load(folder)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.load(folder).decode([0]) == "!"


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, loraplex.model.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "set()\n"
