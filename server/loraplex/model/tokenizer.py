"""The model's tokenizer and chat template, from any Hugging Face folder with a tokenizer.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from loraplex.errors import InvalidRequestError, ModelError
from loraplex.model import chat_template
from loraplex.model.chat_template import ChatTemplate
from loraplex.model.detokenizer import Detokenizer, TokenBytes


class Tokenizer:
    """Text, chats and token ids; safe to use from many threads, none of it changes after `load`."""

    def __init__(self, backend: tokenizers.Tokenizer, chat: ChatTemplate) -> None:
        self._backend = backend
        self._chat = chat
        self._token_bytes = TokenBytes(backend)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Raises ModelError where tokenizer.json is missing or broken."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} holds no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower class
            raise ModelError(f"{path} cannot be read: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
        try:
            _add_missing(backend, config, named.values())
            sources = _template_sources(folder, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / 'tokenizer_config.json'} is malformed: {error}") from error
        return cls(backend, ChatTemplate(sources, named))

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer itself puts around a text, as a BOS."""
        return self._backend.encode(text).ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The chat as the model's template writes it, nothing put around it."""
        text = self._chat.render(
            messages, tools, template_kwargs or {}, add_generation_prompt=add_generation_prompt
        )
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRequestError(chat_template.FIELD, "a lone surrogate is not text")
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The whole text, without special tokens."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """For one sequence; `continues` keeps the leading space of a word that follows a text."""
        return Detokenizer(self._token_bytes, self._special_ids, continues=continues)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds in mid-text, special or not; may be a part of a code point."""
        return self._token_bytes.get(token_id)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _content(token: Any) -> str | None:
    """A token is written as a string or as an AddedToken's fields."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, which are special and which templates may use."""
    named = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    return {key: content for key, content in named.items() if content is not None}


def _add_missing(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Iterable[str]
) -> None:
    """Tokens that tokenizer_config.json alone declares, which transformers adds as well."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        if fields["content"] not in known:
            flags = {key: value for key, value in fields.items() if key != "content"}
            backend.add_tokens([AddedToken(fields["content"], **flags)])
            known.add(fields["content"])
    backend.add_special_tokens([content for content in named if content not in known])


def _template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name; files of their own come before tokenizer_config.json, as in transformers."""
    sources: dict[str, str] = {}
    if (path := folder / "chat_template.jinja").is_file():
        sources["default"] = path.read_text(encoding="utf-8")
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        sources[path.stem] = path.read_text(encoding="utf-8")
    match config.get("chat_template"):
        case _ if sources:
            return sources
        case str(source):
            return {"default": source}
        case list(templates):
            return {template["name"]: template["template"] for template in templates}
    return {}
