"""A request as the engine knows it: its parameters, its tokens, and where it stands."""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults change nothing; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    seed: int = 0
    num_logprobs: int | None = None  # None: no logprobs at all; 0: the sampled token's only

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class StopParams:
    """When to stop, as far as token ids tell; stop strings are the API's, which knows the text."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included, unless ignored


class Phase(Enum):
    """Where a sequence stands between submit and its last token."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a sequence ended by itself. Cancel, deadline and errors are statuses, not reasons."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the raw logits at one position: the sampled token's, and the most likely tokens'."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token_id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent in each stage."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    adapter_wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Freshly sampled tokens, in order; `logprobs` is parallel to them or empty."""

    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence that ended by itself."""

    reason: FinishReason
    stop_token_id: int | None
    cached_tokens: int
    timings: Timings


Client = tuple[str, tuple[str, ...]]
"""Who shares the server fairly with others: a tenant, with the sorted versions of its adapters.

Weights are not part of it: blends of the same members are one client, whatever their weights."""


class BlendPart(NamedTuple):
    """A member of a weighted blend: `weight` times the update of adapter version `digest`."""

    digest: str
    weight: float


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each stands in the output.

    As two parallel arrays, so that a tensor is made of them at once. Mutable: all of it.
    """

    def __init__(self, prompt: Iterable[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self.tokens = array("q", self._places)
        self.counts = array("f", bytes(4 * len(self._places)))
        self.num_output = 0

    def push(self, token: int) -> None:
        """One more token of the output."""
        place = self._places.setdefault(token, len(self.tokens))
        if place == len(self.tokens):
            self.tokens.append(token)
            self.counts.append(0.0)
        self.counts[place] += 1.0
        self.num_output += 1

    def pop(self, token: int, num_distinct: int) -> None:
        """The last one pushed goes; there were so many distinct tokens before it."""
        self.counts[self._places[token]] -= 1.0
        self.num_output -= 1
        if len(self.tokens) > num_distinct:
            del self._places[token]
            self.tokens.pop()
            self.counts.pop()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One request. The first block is set at submit and never changes; the engine owns the rest."""

    request_id: str
    prompt_token_ids: Seq[int]
    sampling: SamplingParams
    stop: StopParams
    digest: str | None = None  # the adapter's version, or its blend's identity; None: bare base
    adapter_id: str = ""  # the name it was asked for by, for messages only
    blend: tuple[BlendPart, ...] = ()  # the members, when `digest` is a blend's
    adapter_start: int = 0  # position of the first token that the adapter acts on (aLoRA)
    tenant: str = ""  # whose it is: nothing is shared between tenants
    priority: int = 0  # higher goes first
    deadline: float | None = None  # the engine's clock; None: it has time

    phase: Phase = Phase.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose KV is in the arena
    num_cached: int = 0  # prompt tokens whose KV was there already
    block_table: list[int] = field(default_factory=list)
    slot: int | None = None  # the adapter's row in the device tables, while it is held
    is_overtakable: bool = True  # False: its adapter was taken away again while it waited
    num_overtaken: int = 0  # by so many, while it waited for memory
    num_displaced: int = 0  # so often it gave its place to a client that had too little
    num_charged: int = 0  # prompt tokens whose computing its client was charged for

    token_counts: TokenCounts | None = None  # the sampler's, where there are penalties

    submitted_at: float = 0.0  # seconds, the engine's clock
    adapter_ready_at: float | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def versions(self) -> tuple[str, ...]:
        """The adapter versions whose weights it needs on the device."""
        if self.blend:
            return tuple(part.digest for part in self.blend)
        return () if self.digest is None else (self.digest,)

    @property
    def client(self) -> Client:
        versions = self.versions
        return (self.tenant, versions if len(versions) < 2 else tuple(sorted(versions)))

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `start..end` of prompt and output together."""
        prompt = len(self.prompt_token_ids)
        if start >= prompt:
            return self.output_token_ids[start - prompt : end - prompt]
        return [*self.prompt_token_ids[start:end], *self.output_token_ids[: max(0, end - prompt)]]

    def timings(self, now: float) -> Timings:
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        ready = self.adapter_ready_at
        wait = 0.0 if ready is None else max(0.0, ready - self.submitted_at)
        return Timings(
            queue=admitted - self.submitted_at,
            prefill=first - admitted,
            decode=now - first,
            adapter_wait=wait,
        )
