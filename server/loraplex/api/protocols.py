"""What the API needs of the engine, the store, the publisher and the tokenizer, and nothing more.

The command line builds the real ones and hands them in; tests hand in fakes.
"""

from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from loraplex.adapters.peft import AdapterConfig
from loraplex.adapters.store import AdapterRecord, Upload, UploadRequest, UploadStatus
from loraplex.adapters.tiers import Tier
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

    def residency(self, version: str) -> Tier:
        """The fastest place that holds a version. A glimpse: it may change at the next step."""

    async def pin(self, version: str, adapter_id: str) -> None:
        """Keep a version on the device for this name, bringing it there when there is room.

        Raises PINS_EXCEED_MEMORY, or why it cannot be read. Idempotent.
        """

    def unpin(self, version: str, adapter_id: str) -> None:
        """The name asks no more. Idempotent."""

    def forget(self, version: str) -> None:
        """The version's files are gone: its copies in memory go with their last use."""


class StoreLike(Protocol):
    """Adapters on disk. Those that say so wait for it; the others only look at memory."""

    def get(self, adapter_id: str) -> AdapterRecord: ...

    def acquire(self, adapter_id: str) -> AdapterRecord:
        """The name's version now, kept with its files until `release`; touches it.

        Raises ADAPTER_NOT_FOUND, or ADAPTER_UNUSABLE unless it is READY.
        """

    def release(self, version: str) -> None:
        """Give an acquired version back; its files may go later."""

    def is_sound(self, version: str) -> bool:
        """Whether it is here, by its bytes: hashed once in this process, which takes the disk."""

    def references(self, version: str) -> int:
        """How many hold it."""

    def list(self, page_size: int, page_token: str) -> tuple[Seq[AdapterRecord], str]: ...

    def pinned(self) -> Seq[AdapterRecord]:
        """The names that are pinned, oldest first."""

    def set_pinned(self, adapter_id: str, pinned: bool) -> AdapterRecord:
        """Written down with the name; waits for the disk."""

    def begin(self, request: UploadRequest) -> Upload:
        """Start an upload or go on with one; waits for the disk. See `AdapterStore.begin`."""

    def upload_status(self, upload_id: str) -> UploadStatus:
        """How far an upload came; UPLOAD_NOT_FOUND when it is unknown or has expired."""

    def clear_upload(self, request: UploadRequest) -> None:
        """Nobody will go on with this very upload; waits for the disk.

        A published one is still remembered.
        """

    def delete(self, adapter_id: str) -> None:
        """Takes the name away; waits for the disk."""


class PublisherLike(Protocol):
    """Checks adapters and makes them durable; blocks, so it runs in worker threads."""

    def check_config(self, config_json: str) -> AdapterConfig: ...

    def publish(
        self,
        upload: Upload,
        config: AdapterConfig,
        sha256: str,
    ) -> tuple[AdapterRecord, bool, Seq[str]]:
        """(record, created, warnings) once the adapter is on disk under `upload.request`'s name.

        `sha256` is what `upload.finish` answered. created False: the name had this very version.
        """


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
