"""Who runs in the next step, with how many tokens, and who gets memory. Pure: no device, no clock.

A step is a list of `Scheduled` rows. Running sequences come first (one token each when decoding, a
chunk of the prompt otherwise), then new ones are admitted in order of arrival, all under one budget
of tokens. A sequence is admitted with blocks for all its tokens so far, and only when its adapters
are resident. One whose adapter is on its way is passed over; one that waits for memory holds back
those behind it, so that nobody starves. Memory that is missing comes from:

    idle adapters       the least recently used first, those that somebody waits for last; for one
                        who waits, none that somebody before it in the queue asks for
    the newest running  goes back to the head of the queue; only for those that run already

So a sequence can lose its adapter to the running ones before it starts; then nobody overtakes it
any more. Adapters are read from disk for all who wait, from the moment they arrive (`Step.wanted`),
and copied ahead for those who wait only for a place among the running.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice

from loraplex.adapters.pool import AdapterPool, Bind, Load, Room
from loraplex.engine.arena import Arena
from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import FinishReason, Logprobs, Phase, Sequence
from loraplex.engine.waiting import WaitingQueue
from loraplex.errors import RequestError

NO_ROOM = Room(0, 0)

RETRY_SECONDS = 30.0
"""So long, about, until it is worth trying again what pins leave no room for: people unpin."""

SizeOf = Callable[[str], int | None]
"""Blocks of a version that lies in host memory, ready to be copied; None: it does not."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue."""

    block_tokens: int  # tokens whose KV fits one block
    max_running: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens `start..start + num_tokens` of one sequence, in one step; its drafts among them."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # it reaches the sequence's last token, so that new ones are drawn
    drafts: tuple[int, ...] = ()  # guesses at the tokens that come next, to be confirmed


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


@dataclass(slots=True)
class _Draft:
    """A step while it is being decided."""

    size_of: SizeOf
    now: float
    budget: int
    rows: list[Scheduled] = field(default_factory=list)
    binds: list[Bind] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    failed: list[tuple[Sequence, RequestError]] = field(default_factory=list)
    num_preempted: int = 0


class Scheduler:
    """Mutable: `waiting`, and `running` in order of admission."""

    def __init__(self, arena: Arena, pool: AdapterPool, config: SchedulerConfig) -> None:
        self.arena = arena
        self.pool = pool
        self.config = config
        self.kv = KVMemory(arena, pool, config.block_tokens)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        pool.awaited = self.waiting.versions

    def add(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        if sequence.digest is not None and self._has_adapters(sequence):
            sequence.adapter_ready_at = sequence.submitted_at

    def loaded(self, version: str, now: float) -> None:
        """An adapter that was on its way is there."""
        self.pool.loaded(version)
        for sequence in self.waiting.needing(version):
            if sequence.adapter_ready_at is None and self._has_adapters(sequence):
                sequence.adapter_ready_at = now

    def is_awaited(self, version: str) -> bool:
        """Whether a sequence or a pin needs it on the device, where it has no place yet."""
        if self.pool.get(version) is not None:
            return False
        return version in self.waiting.versions or version in self.pool.missing_pins

    @property
    def awaited(self) -> list[str]:
        """All such versions."""
        absent = [version for version in self.waiting.versions if self.pool.get(version) is None]
        return list(dict.fromkeys([*self.pool.missing_pins, *absent]))

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands, and everything it held back."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        sequence.phase = Phase.FINISHED

    def schedule(self, size_of: SizeOf, now: float) -> Step:
        """Decide the next step."""
        draft = _Draft(size_of, now, self.config.max_step_tokens)
        num_evicted = self.pool.num_evicted
        for sequence in sorted(self.running, key=_is_prefilling):
            if sequence.phase is Phase.RUNNING:  # not preempted for one before it
                self._continue(sequence, draft)
        if not draft.num_preempted and self._load_pinned(draft):
            self._admit(draft)
        if self.pool.num_evicted > num_evicted:
            self._wait_anew()
        rows = [row for row in draft.rows if row.sequence.phase is Phase.RUNNING]
        rows.sort(key=_row_order)
        urgent, others = self._wanted(size_of)
        return Step(
            rows=tuple(rows),
            binds=tuple(draft.binds),
            loads=tuple(draft.loads),
            wanted=(*urgent, *others),
            num_urgent=len(urgent),
            failed=tuple(draft.failed),
            num_preempted=draft.num_preempted,
            num_evicted=self.pool.num_evicted - num_evicted,
        )

    def update(self, step: Step, drawn: Seq[Drawn], now: float) -> list[Outcome]:
        """Take in what a step computed: `drawn` is parallel to the rows that sample."""
        outcomes = []
        draws = iter(drawn)
        for row in step.rows:
            tokens = next(draws) if row.samples else ()
            num_rejected = 1 + len(row.drafts) - max(1, len(tokens))
            row.sequence.num_computed = row.start + row.num_tokens - num_rejected
            self.kv.commit(row.sequence)
            if row.samples:
                outcomes.append(self._take(row.sequence, tokens, now))
        return outcomes

    def check_integrity(self) -> None:
        self.arena.check_integrity()
        self.pool.check_integrity()
        self.kv.check_integrity(self.running)
        self.waiting.check_integrity()
        uses = Counter(digest for sequence in self.running for digest in _needs(sequence))
        assert uses == self.pool.references(), "references and running sequences disagree"
        for sequence in self.waiting:
            assert sequence.phase is Phase.WAITING, "one that does not wait is in the queue"
            assert not sequence.block_table, "one that waits holds blocks"
            assert sequence.slot is None, "one that waits holds a slot"

    def __repr__(self) -> str:
        running = ", ".join(f"{s.request_id}:{s.num_computed}" for s in self.running)
        waiting = ", ".join(s.request_id for s in self.waiting)
        return f"Scheduler(running [{running}], waiting [{waiting}], {self.arena!r}, {self.pool!r})"

    # Those that run.

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
        while (evicted := self.kv.grow(sequence, num_tokens)) is None:
            newest = self.running[-1]
            if len(self.running) == 1 and not self.pool.is_loading:
                draft.failed.append((sequence, _out_of_memory()))
                self.abort(sequence)
                return False
            self._preempt(newest)
            draft.num_preempted += 1
            if newest is sequence:
                return False
        self._hold_the_line(evicted)
        return True

    def _hold_the_line(self, evicted: Iterable[str]) -> None:
        for version in evicted:
            for sequence in self.waiting.needing(version):
                sequence.is_overtakable = False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its KV is computed anew when there is room."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.put_back(sequence)

    # Those that wait.

    def _load_pinned(self, draft: _Draft) -> bool:
        """Room for pinned adapters that are in host memory; False if one has to wait for it."""
        return all(
            self._load({version: num_blocks}, (), NO_ROOM, draft)
            for version in self.pool.missing_pins
            if (num_blocks := draft.size_of(version)) is not None
        )

    def _admit(self, draft: _Draft) -> None:
        keep: set[str] = set()  # what those so far in the queue need
        claimed = NO_ROOM  # and what those of them who wait for adapters will take besides
        for sequence in tuple(self.waiting):
            if draft.budget == 0 or len(self.running) >= self.config.max_running:
                self._load_ahead(draft)
                return
            if (error := self._refusal(sequence, draft.size_of)) is not None:
                draft.failed.append((sequence, error))
                self.abort(sequence)
                continue
            keep.update(_needs(sequence))
            if self._has_adapters(sequence):
                if not self._start(sequence, keep, draft):
                    return
                self._schedule(sequence, min(sequence.num_tokens, draft.budget), draft)
                continue
            if not self._bring(sequence, keep, claimed, draft) or not sequence.is_overtakable:
                return
            claimed = self._claim(sequence, claimed)

    def _load_ahead(self, draft: _Draft) -> None:
        """Adapters of those who only wait for a place; nothing goes for it that anybody wants."""
        claimed = NO_ROOM
        for sequence in islice(self.waiting, self.config.max_running):
            if not self._bring(sequence, self.waiting.versions, claimed, draft):
                return
            claimed = self._claim(sequence, claimed)

    def _claim(self, sequence: Sequence, claimed: Room) -> Room:
        """And what this one needs beside its adapters."""
        num_blocks = self.kv.blocks_for(sequence.num_tokens)
        return Room(claimed.blocks + num_blocks, claimed.slots + bool(sequence.blend))

    def _bring(
        self, sequence: Sequence, keep: Collection[str], claimed: Room, draft: _Draft
    ) -> bool:
        """Room for those of its adapters that can be copied; False if there is none for them."""
        absent = {v: draft.size_of(v) for v in sequence.versions if self.pool.get(v) is None}
        sizes = {version: size for version, size in absent.items() if size is not None}
        return self._load(sizes, keep, claimed, draft)

    def _load(
        self, sizes: Mapping[str, int], keep: Collection[str], claimed: Room, draft: _Draft
    ) -> bool:
        """All of them or none; and only beside what others claim, and a block for each running one.

        Else memory would fill with adapters that must go again before they are of use, or that
        drive out what runs.
        """
        if not sizes:
            return True
        room = self.pool.room(keep)
        blocks = len(self.running) + claimed.blocks + sum(sizes.values())
        if blocks > room.blocks or claimed.slots + len(sizes) > room.slots:
            return False
        for version, num_blocks in sizes.items():
            load = self.pool.reserve(version, num_blocks, keep)
            assert load is not None, "room was counted that is not there"
            draft.loads.append(load)
        return True

    def _has_adapters(self, sequence: Sequence) -> bool:
        return all(self.pool.is_ready(version) for version in sequence.versions)

    def _start(self, sequence: Sequence, keep: set[str], draft: _Draft) -> bool:
        """Give a waiting sequence its blocks and adapter; False if there is no room."""
        digest = sequence.digest
        is_unbound = digest is not None and self.pool.get(digest) is None
        if not self.kv.start(sequence, int(is_unbound), keep):
            return False
        if digest is not None and is_unbound:
            bind = self.pool.bind(digest, sequence.blend, keep)
            assert bind is not None, "room was made that is not there"
            draft.binds.append(bind)
        self.waiting.remove(sequence)
        if digest is not None:
            sequence.slot = self.pool.acquire(digest)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = draft.now
        return True

    def _wanted(self, size_of: SizeOf) -> tuple[list[str], list[str]]:
        """What must be read: for pins and the first in the queue; for others, most wanted first."""
        wanted = self.waiting.versions
        missing = [v for v in wanted if self.pool.get(v) is None and size_of(v) is None]
        missing.sort(key=lambda version: -self.waiting.demand(version))
        urgent = [version for version in self.pool.missing_pins if size_of(version) is None]
        if missing:
            first = next(iter(self.waiting))
            urgent += [v for v in first.versions if v in missing and v not in urgent]
        return urgent, [version for version in missing if version not in urgent]

    def _wait_anew(self) -> None:
        """Those who have not begun, and lost an adapter that had come for them."""
        for sequence in self.waiting:
            if sequence.admitted_at is None and not self._has_adapters(sequence):
                sequence.adapter_ready_at = None

    def _refusal(self, sequence: Sequence, size_of: SizeOf) -> RequestError | None:
        """Why it never fits beside what is pinned, as far as its adapters' sizes are known."""
        pool, versions = self.pool, sequence.versions
        blocks = self.kv.blocks_for(sequence.num_tokens)
        blocks += sum(pool.num_blocks_of(v) or size_of(v) or 0 for v in versions)
        slots = len(versions) + bool(sequence.blend)
        pinned = pool.pinned_room(but=versions)
        num_blocks, num_slots = self.arena.num_blocks, pool.num_slots
        if blocks > num_blocks or slots > num_slots:
            if sequence.output_token_ids:
                return _out_of_memory()
            return _exceeds_slots(slots, num_slots) if slots > num_slots else _exceeds_memory()
        if slots + pinned.slots > num_slots:
            return _pinned_away("too few slots (--max-slots)")
        if blocks + pinned.blocks > num_blocks:
            return _pinned_away("too little memory (--memory)")
        return None

    # Small change.

    def _take(self, sequence: Sequence, drawn: Drawn, now: float) -> Outcome:
        if not drawn:
            self.abort(sequence)
            return Outcome(sequence, (), None)
        finish = None
        taken = []
        for sampled in drawn:
            taken.append(sampled)
            sequence.output_token_ids.append(sampled.token_id)
            if sampled.token_id in sequence.stop.stop_token_ids:
                finish = FinishReason.STOP_TOKEN
            elif len(sequence.output_token_ids) >= sequence.stop.max_tokens:
                finish = FinishReason.LENGTH
            if finish is not None:
                break
        if sequence.first_token_at is None:
            sequence.first_token_at = now
        if finish is not None:
            self.abort(sequence)
        return Outcome(sequence, tuple(taken), finish)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        if sequence.slot is not None:
            assert sequence.digest is not None
            self.pool.release(sequence.digest)
            sequence.slot = None


def _needs(sequence: Sequence) -> set[str]:
    """What it holds on the device while it runs: its adapters, and its blend."""
    return set(sequence.versions) | ({sequence.digest} if sequence.digest is not None else set())


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed > 1


def _row_order(row: Scheduled) -> tuple[bool, int]:
    slot = row.sequence.slot
    return (row.num_tokens > 1, -1 if slot is None else slot)


def _out_of_memory() -> RequestError:
    return RequestError(
        "OUT_OF_MEMORY", "the memory for KV and adapters is full and nothing else can give way"
    )


def _pinned_away(left: str) -> RequestError:
    return RequestError(
        "OUT_OF_MEMORY",
        f"the pinned adapters leave {left} for this request and its adapters",
        retry_after=RETRY_SECONDS,
    )


def _exceeds_memory() -> RequestError:
    return RequestError(
        "EXCEEDS_KV_CAPACITY",
        "the prompt and its adapters are larger than the memory for KV and adapters",
    )


def _exceeds_slots(needed: int, num_slots: int) -> RequestError:
    return RequestError(
        "EXCEEDS_KV_CAPACITY",
        f"the blend takes {needed} slots, one of them its own; there are {num_slots} (--max-slots)",
    )
