"""Random traffic through scheduler, arena and pool with a model that reads what memory holds.

The fake model's next token is a sum over the (adapter, token, position) triples that it finds in
the sequence's blocks. So a block given to two owners, KV that a preemption lost, or an adapter
overwritten while in use all end in another text than the same request gives alone.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex.adapters.pool import AdapterPool, Load
from loraplex.engine.arena import Arena, Use
from loraplex.engine.scheduler import Sampled, Scheduled, Scheduler, SchedulerConfig, Step
from loraplex.engine.sequence import (
    FinishReason,
    Phase,
    SamplingParams,
    Sequence,
    StopParams,
)
from loraplex.errors import RequestError

DIGESTS = "abcde"
VOCAB = 50
STOP = 7
MAX_DRAIN_STEPS = 1000

REQUESTS = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.sampled_from([None, *DIGESTS]),
    st.integers(1, 16),  # max_tokens
)

Cell = tuple[int, int, int]  # what a token's KV is made of: adapter, token, position


def next_token(cells: list[Cell]) -> int:
    mixed = sum(
        (adapter * 7 + token * 31 + 11) * (position + 1) for adapter, token, position in cells
    )
    return mixed % VOCAB


def adapter_mark(digest: str | None) -> int:
    return 0 if digest is None else DIGESTS.index(digest) + 1


def text_of(sequence: Sequence) -> list[int]:
    """The output that a sequence has when it runs alone in boundless memory."""
    tokens = list(sequence.prompt_token_ids)
    output: list[int] = []
    mark = adapter_mark(sequence.digest)
    while len(output) < sequence.stop.max_tokens and STOP not in output:
        output.append(next_token([(mark, token, at) for at, token in enumerate(tokens)]))
        tokens.append(output[-1])
    return output


@dataclass
class Device:
    """Block contents: an adapter's mark, or a cell for each token. A stand-in for the runner."""

    block_tokens: int
    blocks: dict[int, int | list[Cell | None]] = field(default_factory=dict)

    def copy_adapter(self, load: Load) -> None:
        for block in load.blocks:
            self.blocks[block] = adapter_mark(load.digest)

    def run(self, row: Scheduled, adapter_blocks: list[int]) -> int:
        """Write the row's KV, then read the whole context back."""
        marks = {self.blocks[block] for block in adapter_blocks} or {0}
        assert marks == {adapter_mark(row.sequence.digest)}, "an adapter was overwritten"
        (mark,) = marks
        assert isinstance(mark, int)
        table, end = row.sequence.block_table, row.start + row.num_tokens
        tokens = row.sequence.token_ids(row.start, end)
        assert len(tokens) == row.num_tokens
        for at, token in enumerate(tokens, start=row.start):
            block = table[at // self.block_tokens]
            cells = self.blocks.get(block)
            if not isinstance(cells, list):
                cells = self.blocks[block] = [None] * self.block_tokens
            cells[at % self.block_tokens] = (mark, token, at)
        seen = [self.cell(table, at) for at in range(end)]
        return next_token(seen)

    def cell(self, table: list[int], at: int) -> Cell:
        cells = self.blocks[table[at // self.block_tokens]]
        assert isinstance(cells, list), "KV was overwritten by an adapter"
        cell = cells[at % self.block_tokens]
        assert cell is not None, "a token's KV was never computed"
        return cell


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(8, 40),
        num_slots=st.integers(1, 4),
        block_tokens=st.integers(1, 3),
        max_running=st.integers(2, 6),
        max_step_tokens=st.sampled_from([1, 3, 8, 16, 32]),
        sizes=st.lists(st.integers(1, 9), min_size=len(DIGESTS), max_size=len(DIGESTS)),
    )
    def start(
        self,
        num_blocks: int,
        num_slots: int,
        block_tokens: int,
        max_running: int,
        max_step_tokens: int,
        sizes: list[int],
    ) -> None:
        self.sizes = dict(zip(DIGESTS, sizes, strict=True))
        self.arena = Arena(num_blocks)
        self.pool = AdapterPool(self.arena, num_slots)
        limits = SchedulerConfig(block_tokens, max_running, max_step_tokens)
        self.scheduler = Scheduler(self.arena, self.pool, limits)
        self.device = Device(block_tokens)
        self.live: list[Sequence] = []
        self.reading: list[str] = []
        self.packed: dict[str, int] = {}  # what the engine hands to schedule()
        self.copying: list[Load] = []
        self.num_added = 0

    # Requests come and go.

    @precondition(lambda self: len(self.live) < 10)
    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests: list[tuple[list[int], str | None, int]]) -> None:
        for prompt, digest, max_tokens in requests:
            self.num_added += 1
            stop = StopParams(max_tokens, stop_token_ids=frozenset({STOP}))
            sequence = Sequence(f"r{self.num_added}", prompt, SamplingParams(), stop, digest)
            self.live.append(sequence)
            self.scheduler.add(sequence)

    @precondition(lambda self: len(self.live) > 3)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.scheduler.abort(sequence)

    # Adapters are read from disk and copied, or fail at either.

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), fails=st.booleans())
    def read_ends(self, data: st.DataObject, fails: bool) -> None:
        self.end_read(data.draw(st.sampled_from(self.reading)), fails)

    def end_read(self, digest: str, fails: bool) -> None:
        self.reading.remove(digest)
        if fails:
            self.fail_waiting(digest)
        else:
            self.packed[digest] = self.sizes[digest]

    @precondition(lambda self: self.copying)
    @rule(data=st.data(), fails=st.booleans())
    def copy_ends(self, data: st.DataObject, fails: bool) -> None:
        self.end_copy(data.draw(st.sampled_from(self.copying)), fails)

    def end_copy(self, load: Load, fails: bool) -> None:
        self.copying.remove(load)
        del self.packed[load.digest]
        if fails:
            self.pool.drop(load.digest)
            self.fail_waiting(load.digest)
        else:
            self.device.copy_adapter(load)
            self.pool.loaded(load.digest)

    def fail_waiting(self, digest: str) -> None:
        for sequence in [s for s in self.scheduler.waiting if s.digest == digest]:
            self.live.remove(sequence)
            self.scheduler.abort(sequence)

    # Steps.

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.run_step()
            self.is_whole()

    @rule()
    def step_with_a_nan(self) -> None:
        self.run_step(num_nan=1)

    def run_step(self, num_nan: int = 0) -> Step:
        step = self.scheduler.schedule(self.packed, now=0.0)
        self.check_rows(step)
        self.copying += step.loads
        self.reading += [digest for digest in step.wanted if digest not in self.reading]
        for sequence, error in step.failed:
            self.check_failure(sequence, error)
        sampled: list[Sampled] = []
        for row in step.rows:
            token = self.device.run(row, self.adapter_blocks(row.sequence))
            if row.samples:
                sampled.append(Sampled(None if len(sampled) < num_nan else token))
        for outcome in self.scheduler.update(step, sampled, now=0.0):
            sequence = outcome.sequence
            if outcome.token_id is None:
                assert sequence.phase is Phase.FINISHED
                self.live.remove(sequence)
            elif outcome.finish is not None:
                self.live.remove(sequence)
                self.check_finished(sequence, outcome.finish)
        return step

    def adapter_blocks(self, sequence: Sequence) -> list[int]:
        if sequence.digest is None:
            return []
        resident = self.pool.get(sequence.digest)
        assert resident is not None, "the adapter of a running sequence is gone"
        assert resident.ready
        assert resident.slot == sequence.slot
        return resident.blocks

    def check_rows(self, step: Step) -> None:
        rows = step.rows
        assert sum(row.num_tokens for row in rows) <= self.scheduler.config.max_step_tokens
        assert len({row.sequence.request_id for row in rows}) == len(rows)
        order = [
            (row.num_tokens > 1, -1 if (s := row.sequence.slot) is None else s) for row in rows
        ]
        assert order == sorted(order), "decode first, then by slot"
        for row in rows:
            assert row.num_tokens > 0
            assert row.sequence.phase is Phase.RUNNING
            assert row.start == row.sequence.num_computed
            assert row.samples == (row.start + row.num_tokens == row.sequence.num_tokens)

    def check_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Only what would not fit an arena of its own fails, for the reason that is true."""
        self.live.remove(sequence)
        adapter = 0 if sequence.digest is None else self.sizes[sequence.digest]
        needed = self.scheduler.blocks_for(sequence.num_tokens) + adapter
        assert needed > self.arena.num_blocks, error.message
        started = bool(sequence.output_token_ids)
        assert error.reason.name == ("OUT_OF_MEMORY" if started else "EXCEEDS_KV_CAPACITY")

    def check_finished(self, sequence: Sequence, reason: FinishReason) -> None:
        assert sequence.output_token_ids == text_of(sequence)
        stopped = sequence.output_token_ids[-1] == STOP
        assert reason is (FinishReason.STOP_TOKEN if stopped else FinishReason.LENGTH)

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= self.scheduler.config.max_running
        assert {id(s) for s in self.live} == {id(s) for s in [*running, *waiting]}
        assert all(not s.block_table and s.slot is None for s in waiting)
        for sequence in self.live:
            expected = text_of(sequence)[: len(sequence.output_token_ids)]
            assert sequence.output_token_ids == expected

    def teardown(self) -> None:
        """Nobody starves: left alone, everything ends, and memory comes back."""
        if not hasattr(self, "scheduler"):
            return
        idle_steps = 0
        for _ in range(MAX_DRAIN_STEPS):
            if not self.live:
                break
            step = self.run_step()
            self.is_whole()
            idle_steps = 0 if step.rows or step.failed else idle_steps + 1
            assert idle_steps <= 3, "nothing runs although nothing is under way"
            for digest in list(self.reading):
                self.end_read(digest, fails=False)
            for load in list(self.copying):
                self.end_copy(load, fails=False)
        assert not self.live, "a sequence starves"
        assert self.arena.count(Use.KV) == 0
        for load in list(self.copying):
            self.end_copy(load, fails=False)
        while self.pool.evict_idle():
            pass
        assert self.arena.num_free == self.arena.num_blocks


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)
# Shrinking a failure may take hypothesis five minutes.
TestScheduler = pytest.mark.timeout(600)(SchedulerMachine.TestCase)
