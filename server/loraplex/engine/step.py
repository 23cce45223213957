"""One step's data, between scheduler, device and engine: rebuilt each step, never changed."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from loraplex.adapters.pool import Bind, Load
from loraplex.engine.sequence import FinishReason, Logprobs, Sequence
from loraplex.errors import RequestError


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens `start..start + num_tokens` of one sequence, in one step; its drafts among them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # it reaches the sequence's last token, so that new ones are drawn
    drafts: tuple[int, ...] = ()  # guesses at the tokens that come next, to be confirmed

    @property
    def is_decode(self) -> bool:
        """Whether it goes on from the last token drawn, or begins with a prompt of one token."""
        return self.num_tokens == 1 + len(self.drafts)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token that the model drew."""

    token_id: int
    logprobs: Logprobs | None = None


Drawn = tuple[Sampled, ...]
"""For one row that samples: the next token, and one more for each draft that was confirmed.

Empty: its logits were not finite."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decision of the scheduler, and the work it gives others."""

    rows: tuple[Scheduled, ...]  # ordered by (decode first, slot)
    binds: tuple[Bind, ...] = ()  # blends that got a slot; the rows count on it
    loads: tuple[Load, ...] = ()  # adapters that got room and must be copied there
    wanted: tuple[str, ...] = ()  # adapters to be read from disk, the most wanted first
    num_urgent: int = 0  # so many of them come first: pinned, or the first in the queue's
    failed: tuple[tuple[Sequence, RequestError], ...] = ()  # could never run
    num_preempted: int = 0
    num_evicted: int = 0  # adapters that made room


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did to one sequence that sampled."""

    sequence: Sequence
    drawn: Drawn  # those that were appended; none: its logits were not finite
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class StepLoad:
    """How much one forward pass has to compute and read."""

    num_decode: int  # rows of one token, which go on
    context: int  # tokens that those read, together
    num_prefill: int  # all other tokens but drafts
    prefill_context: int  # tokens that those read, together
    num_drafts: int = 0
    num_adapters: int = 0  # distinct ones of the rows that go on


def load_of(rows: Seq[Scheduled]) -> StepLoad:
    num_decode = context = num_prefill = prefill_context = num_drafts = 0
    slots = set()
    for row in rows:
        if row.is_decode:
            num_decode += 1
            context += row.start + 1
            num_drafts += len(row.drafts)
            slots.add(row.sequence.slot)
        else:
            num_prefill += row.num_tokens
            prefill_context += row.num_tokens * row.start + row.num_tokens * row.num_tokens // 2
    num_adapters = len(slots - {None})
    return StepLoad(num_decode, context, num_prefill, prefill_context, num_drafts, num_adapters)
