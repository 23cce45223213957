"""What the API needs of the engine, the store, the publisher and the tokenizer, and nothing more.

The command line builds the real ones and hands them in; tests hand in fakes.
"""

from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.adapters.peft import AdapterConfig
from loraplex.adapters.store import AdapterRecord, Upload
from loraplex.engine.sequence import Finished, SamplingParams, Sequence, Timings, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server was started with, as GetServerInfo tells it."""

    max_rank: int
    max_slots: int  # adapters resident at one time
    max_running: int
    max_waiting: int
    max_adapter_bytes: int
    memory_bytes: int  # the arena: KV and adapters
    max_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The base model as far as requests are checked against it."""

    name: str
    base_id: str
    architecture: str
    device: str
    dtype: str
    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    default_sampling: SamplingParams  # the checkpoint's generation_config, else neutral
    limits: Limits
    kv_capacity_tokens: int  # the most tokens that one sequence could ever hold
    quantization: str = "nf4"


class TokenStream(Protocol):
    """What becomes of one sequence: Tokens, then one Finished, or a RequestError."""

    def __aiter__(self) -> AsyncIterator[Tokens | Finished]: ...

    def timings(self) -> Timings: ...


class EngineLike(Protocol):
    """Runs sequences; called from the event loop only, and never blocks it."""

    def submit(self, sequence: Sequence) -> TokenStream: ...

    def abort(self, request_id: str) -> None: ...

    def residency(self, digest: str) -> bool: ...


class StoreLike(Protocol):
    """Adapters on disk. `begin`, `delete` and `release` may wait for it, the others do not."""

    def get(self, adapter_id: str) -> AdapterRecord: ...

    def list(self, page_size: int, page_token: str) -> tuple[Seq[AdapterRecord], str]: ...

    def begin(self, adapter_id: str, total_size: int) -> Upload: ...

    def delete(self, adapter_id: str) -> None: ...

    def retain(self, version: str) -> None: ...

    def release(self, version: str) -> None: ...

    def touch(self, adapter_id: str) -> None: ...


class PublisherLike(Protocol):
    """Checks adapters and makes them durable; blocks, so it runs in worker threads."""

    def check_config(self, config_json: str) -> AdapterConfig: ...

    def publish(
        self,
        upload: Upload,
        adapter_id: str,
        config: AdapterConfig,
        sha256: str,
        visibility: str,
    ) -> tuple[AdapterRecord, bool, Seq[str]]: ...


class Detokenizer(Protocol):
    """Token ids to whole UTF-8 text, special tokens left out."""

    def push(self, token_ids: Seq[int]) -> str: ...

    def flush(self) -> str: ...


class TokenizerLike(Protocol):
    """Text and chats to token ids and back; encoding blocks."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(
        self,
        messages: Seq[Mapping[str, Any]],
        tools: list[Any] | None,
        template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> list[int]: ...

    def detokenizer(self, *, continues: bool) -> Detokenizer:
        """`continues`: the text goes on from the prompt's, so a leading space is part of it."""
