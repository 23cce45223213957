"""Who runs in the next step, with how many tokens, and who gets memory. Pure: no device, no clock.

A step is a list of `Scheduled` rows. Running sequences come first (one token each when decoding, a
chunk of the prompt otherwise), then new ones are admitted in order of arrival, all under one budget
of tokens. A sequence is admitted with blocks for all its tokens so far, and only when its adapter
is resident; one whose adapter is on its way is passed over, one that waits for memory holds back
those behind it, so that nobody starves.
"""

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from loraplex.adapters.pool import AdapterPool, Load
from loraplex.engine.arena import Arena, Use
from loraplex.engine.sequence import FinishReason, Logprobs, Phase, Sequence
from loraplex.errors import RequestError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue."""

    block_tokens: int  # tokens whose KV fits one block
    max_running: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens `start..start + num_tokens` of one sequence, in one step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # its last token is the sequence's last one, so that a new one is drawn


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the model drew for one row that samples; None: its logits were not finite."""

    token_id: int | None
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One decision of the scheduler, and the work it gives others."""

    rows: tuple[Scheduled, ...]  # ordered by (decode first, slot)
    loads: tuple[Load, ...] = ()  # adapters that got room and must be copied there
    wanted: tuple[str, ...] = ()  # adapters that wait to be read from disk
    failed: tuple[tuple[Sequence, RequestError], ...] = ()  # could never run
    num_preempted: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did to one sequence that sampled."""

    sequence: Sequence
    token_id: int | None
    logprobs: Logprobs | None
    finish: FinishReason | None


@dataclass(slots=True)
class _Draft:
    """A step while it is being decided."""

    budget: int
    rows: list[Scheduled] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    wanted: list[str] = field(default_factory=list)
    failed: list[tuple[Sequence, RequestError]] = field(default_factory=list)
    num_preempted: int = 0


class Scheduler:
    """Mutable: `waiting` in order of arrival, `running` in order of admission."""

    def __init__(self, arena: Arena, pool: AdapterPool, config: SchedulerConfig) -> None:
        self.arena = arena
        self.pool = pool
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands, and everything it held back."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        sequence.phase = Phase.FINISHED

    def schedule(self, adapter_blocks: Mapping[str, int], now: float) -> Step:
        """Decide the next step. `adapter_blocks` tells the size of adapters ready to be copied."""
        draft = _Draft(self.config.max_step_tokens)
        for sequence in sorted(self.running, key=_is_prefilling):
            if sequence.phase is Phase.RUNNING:  # not preempted for one before it
                self._continue(sequence, draft)
        if not draft.num_preempted:
            self._admit(draft, adapter_blocks, now)
        rows = [row for row in draft.rows if row.sequence.phase is Phase.RUNNING]
        rows.sort(key=_row_order)
        return Step(
            tuple(rows),
            tuple(draft.loads),
            tuple(draft.wanted),
            tuple(draft.failed),
            draft.num_preempted,
        )

    def update(self, step: Step, sampled: Seq[Sampled], now: float) -> list[Outcome]:
        """Take in what a step computed: `sampled` is parallel to the rows that sample."""
        outcomes = []
        draws = iter(sampled)
        for row in step.rows:
            row.sequence.num_computed = row.start + row.num_tokens
            if row.samples:
                outcomes.append(self._take(row.sequence, next(draws), now))
        return outcomes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_tokens)

    def check_integrity(self) -> None:
        self.arena.check_integrity()
        self.pool.check_integrity()
        held = sum(len(sequence.block_table) for sequence in self.running)
        assert held == self.arena.count(Use.KV), "KV blocks and running sequences disagree"

    def _continue(self, sequence: Sequence, draft: _Draft) -> None:
        num_tokens = min(sequence.num_tokens - sequence.num_computed, draft.budget)
        if num_tokens == 0:
            return
        if not self._grow(sequence, sequence.num_computed + num_tokens, draft):
            return
        self._schedule(sequence, num_tokens, draft)

    def _schedule(self, sequence: Sequence, num_tokens: int, draft: _Draft) -> None:
        start = sequence.num_computed
        samples = start + num_tokens == sequence.num_tokens
        draft.rows.append(Scheduled(sequence, start, num_tokens, samples))
        draft.budget -= num_tokens

    def _grow(self, sequence: Sequence, num_tokens: int, draft: _Draft) -> bool:
        """Blocks for `num_tokens` of a running sequence: idle adapters go, then the newest one.

        One that runs alone fails, unless an adapter on its way holds what it could have later.
        """
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        while missing > 0:
            blocks = self.arena.allocate(missing, Use.KV)
            if blocks is not None:
                sequence.block_table += blocks
                break
            if self.pool.evict_idle():
                continue
            newest = self.running[-1]
            if len(self.running) == 1 and not self.pool.is_loading:
                draft.failed.append((sequence, _out_of_memory()))
                self.abort(sequence)
                return False
            self._preempt(newest)
            draft.num_preempted += 1
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its KV is computed anew when there is room."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.appendleft(sequence)

    def _admit(self, draft: _Draft, adapter_blocks: Mapping[str, int], now: float) -> None:
        for sequence in list(self.waiting):
            if draft.budget == 0 or len(self.running) >= self.config.max_running:
                return
            if self._never_fits(sequence, adapter_blocks):
                draft.failed.append((sequence, _exceeds_capacity()))
                self.abort(sequence)
                continue
            if sequence.digest is not None and not self._is_ready(sequence.digest):
                if self._wait_for_adapter(sequence.digest, adapter_blocks, draft):
                    continue
                return
            if not self._start(sequence, now):
                return
            num_tokens = min(sequence.num_tokens, draft.budget)
            self._schedule(sequence, num_tokens, draft)

    def _is_ready(self, digest: str) -> bool:
        resident = self.pool.get(digest)
        return resident is not None and resident.ready

    def _wait_for_adapter(
        self, digest: str, adapter_blocks: Mapping[str, int], draft: _Draft
    ) -> bool:
        """True: it is on its way, others may overtake. False: it waits for room."""
        if self.pool.get(digest) is not None:
            return True
        num_blocks = adapter_blocks.get(digest)
        if num_blocks is None:
            if digest not in draft.wanted:
                draft.wanted.append(digest)
            return True
        load = self.pool.reserve(digest, num_blocks)
        if load is None:
            return False
        draft.loads.append(load)
        return True

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Give a waiting sequence its blocks and adapter; False if there is no room."""
        if sequence.digest is not None:
            sequence.slot = self.pool.acquire(sequence.digest)
            if sequence.adapter_ready_at is None:
                sequence.adapter_ready_at = now
        needed = self.blocks_for(sequence.num_tokens)
        while (blocks := self.arena.allocate(needed, Use.KV)) is None:
            if not self.pool.evict_idle():
                self._release(sequence)
                return False
        sequence.block_table = blocks
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.phase = Phase.RUNNING
        if sequence.admitted_at is None:
            sequence.admitted_at = now
        return True

    def _never_fits(self, sequence: Sequence, adapter_blocks: Mapping[str, int]) -> bool:
        blocks = self.blocks_for(sequence.num_tokens)
        if sequence.digest is not None:
            resident = self.pool.get(sequence.digest)
            size = len(resident.blocks) if resident else adapter_blocks.get(sequence.digest, 0)
            blocks += size
        return blocks > self.arena.num_blocks

    def _take(self, sequence: Sequence, drawn: Sampled, now: float) -> Outcome:
        if drawn.token_id is None:
            self.abort(sequence)
            return Outcome(sequence, None, None, None)
        sequence.output_token_ids.append(drawn.token_id)
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        finish = None
        if drawn.token_id in sequence.stop.stop_token_ids:
            finish = FinishReason.STOP_TOKEN
        elif len(sequence.output_token_ids) >= sequence.stop.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self.abort(sequence)
        return Outcome(sequence, drawn.token_id, drawn.logprobs, finish)

    def _release(self, sequence: Sequence) -> None:
        self.arena.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0
        if sequence.slot is not None:
            assert sequence.digest is not None
            self.pool.release(sequence.digest)
            sequence.slot = None


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed > 1


def _row_order(row: Scheduled) -> tuple[bool, int]:
    slot = row.sequence.slot
    return (row.num_tokens > 1, -1 if slot is None else slot)


def _out_of_memory() -> RequestError:
    return RequestError(
        "OUT_OF_MEMORY", "the memory for KV and adapters is full and nothing else can give way"
    )


def _exceeds_capacity() -> RequestError:
    return RequestError(
        "EXCEEDS_KV_CAPACITY",
        "the prompt and its adapter are larger than the memory for KV and adapters",
    )
