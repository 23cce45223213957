"""Random traffic through scheduler, pool, arena and supply, the model reading what memory holds.

The fake model's next token is a sum over the (adapter, token, position) triples that it finds in
the sequence's blocks, and what the adapter is it finds through its slot, in the blocks that the
slot points to. So a block given to two owners, KV that a preemption lost, an adapter overwritten or
a slot bound anew while in use all end in another text than the same request gives alone.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex.adapters.pool import AdapterPool
from loraplex.adapters.tiers import HostTier, Tier
from loraplex.engine.arena import Arena, Use
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import (
    BlendPart,
    FinishReason,
    Phase,
    SamplingParams,
    Sequence,
    StopParams,
)
from loraplex.engine.step import Drawn, Sampled, Scheduled, Step
from loraplex.engine.supply import Supply
from loraplex.errors import RequestError

from tests.server.engine.told import Told

DIGESTS = "abcdef"
OWNERS = "xy"
VOCAB = 50
STOP = 7
MAX_DRAIN_STEPS = 1000
TORN = -1  # in a block that is being copied

VERSIONS = st.sampled_from(DIGESTS)
BLENDS = st.dictionaries(VERSIONS, st.integers(1, 3), min_size=1, max_size=3)
REQUESTS = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.one_of(st.none(), VERSIONS, VERSIONS, BLENDS),
    st.integers(1, 16),  # max_tokens
    st.sampled_from([0, 0, 0, 1, -1]),  # priority
    st.sampled_from(["", "", "t"]),  # tenant
)

Cell = tuple[int, int, int]  # what a token's KV is made of: adapter, token, position


@dataclass(frozen=True)
class Packed:
    digest: str
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks


def next_token(cells: list[Cell]) -> int:
    mixed = sum(
        (adapter * 7 + token * 31 + 11) * (position + 1) for adapter, token, position in cells
    )
    return mixed % VOCAB


def mark_of(digest: str) -> int:
    """So that no sums of a few are the same."""
    return int(10 ** DIGESTS.index(digest))


Request = tuple[list[int], str | dict[str, int] | None, int, int, str]


def request_of(request_id: str, request: Request) -> Sequence:
    prompt, adapter, max_tokens, priority, tenant = request
    stop = StopParams(max_tokens, stop_token_ids=frozenset({STOP}))
    blend: tuple[BlendPart, ...] = ()
    if isinstance(adapter, dict):
        blend = tuple(BlendPart(*part) for part in sorted(adapter.items()))
        adapter = f"blend {blend}"
    sequence = Sequence(request_id, prompt, SamplingParams(), stop, adapter, blend=blend)
    sequence.priority, sequence.tenant = priority, tenant
    return sequence


def text_of(sequence: Sequence) -> list[int]:
    """The output that a sequence has when it runs alone in boundless memory."""
    tokens = list(sequence.prompt_token_ids)
    output: list[int] = []
    parts = sequence.blend or [BlendPart(version, 1) for version in sequence.versions]
    mark = sum(int(part.weight) * mark_of(part.digest) for part in parts)
    while len(output) < sequence.stop.max_tokens and STOP not in output:
        output.append(next_token([(mark, token, at) for at, token in enumerate(tokens)]))
        tokens.append(output[-1])
    return output


@dataclass
class Device:
    """Block contents: an adapter's mark, or a cell for each token; and where slots point."""

    block_tokens: int
    blocks: dict[int, int | list[Cell | None]] = field(default_factory=dict)
    slots: dict[int, list[tuple[int, list[int]]]] = field(default_factory=dict)  # weight, blocks

    def copy_adapter(self, packed: Packed, blocks: Seq[int]) -> None:
        for block in blocks:
            self.blocks[block] = mark_of(packed.digest)

    def bind_slot(self, slot: int, packed: Packed, blocks: Seq[int]) -> None:
        self.slots[slot] = [(1, list(blocks))]

    def bind_blend(self, slot: int, members: Seq[tuple[int, float]]) -> None:
        self.slots[slot] = [
            (int(weight) * inner, blocks)
            for member, weight in members
            for inner, blocks in self.slots[member]
        ]

    def mark(self, slot: int | None) -> int:
        total = 0
        for weight, blocks in [] if slot is None else self.slots[slot]:
            marks = {mark for block in blocks if isinstance(mark := self.blocks[block], int)}
            assert len(marks) == 1, "an adapter was overwritten"
            assert TORN not in marks, "an adapter is used before it is there"
            total += weight * marks.pop()
        return total

    def run(self, row: Scheduled) -> Drawn:
        """Write the row's KV, then read the whole context back: at each place that draws."""
        mark = self.mark(row.sequence.slot)
        table, end = row.sequence.block_table, row.start + row.num_tokens
        tokens = [*row.sequence.token_ids(row.start, end), *row.drafts]
        assert len(tokens) == row.num_tokens
        for at, token in enumerate(tokens, start=row.start):
            block = table[at // self.block_tokens]
            cells = self.blocks.get(block)
            if not isinstance(cells, list):
                cells = self.blocks[block] = [None] * self.block_tokens
            cells[at % self.block_tokens] = (mark, token, at)
        seen = [self.cell(table, at) for at in range(end)]
        drawn: list[Sampled] = []
        for at, draft in enumerate((*row.drafts, None), start=end - len(row.drafts)):
            drawn.append(Sampled(next_token(seen[:at])))
            if drawn[-1].token_id != draft:
                break
        return tuple(drawn)

    def cell(self, table: list[int], at: int) -> Cell:
        cells = self.blocks[table[at // self.block_tokens]]
        assert isinstance(cells, list), "KV was overwritten by an adapter"
        cell = cells[at % self.block_tokens]
        assert cell is not None, "a token's KV was never computed"
        return cell


@dataclass
class Disk:
    """A loader whose reads and copies end when, and as, the machine says."""

    sizes: dict[str, int]
    reads: dict[str, "Future[Packed]"] = field(default_factory=dict)
    copies: list[tuple[Callable[[], None], "Future[None]"]] = field(default_factory=list)

    def read(self, digest: str) -> "Future[Packed]":
        assert digest not in self.reads, "read twice at a time"
        self.reads[digest] = Future()
        return self.reads[digest]

    def run(self, work: Callable[[], None]) -> "Future[None]":
        self.copies.append((work, Future()))
        return self.copies[-1][1]

    def end_read(self, digest: str, fails: bool) -> None:
        future = self.reads.pop(digest)
        if fails:
            future.set_exception(RequestError("ADAPTER_UNUSABLE", "damaged"))
        else:
            future.set_result(Packed(digest, self.sizes[digest]))

    def end_copy(self, index: int, fails: bool) -> None:
        work, future = self.copies.pop(index)
        if fails:
            future.set_exception(RequestError("STORE_UNAVAILABLE", "gone"))
        else:
            work()
            future.set_result(None)


def drafts_of(sequence: Sequence, num_drafts: int) -> list[int]:
    """Right, but for every fourth token of the output."""
    start = len(sequence.output_token_ids)
    right = text_of(sequence)[start : start + num_drafts]
    return [token + (at % 4 == 3) for at, token in enumerate(right, start)]


class Quiet:
    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None: ...

    def on_evictions(self, tier: Tier, count: int) -> None: ...


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(8, 40),
        num_slots=st.integers(1, 6),
        block_tokens=st.integers(1, 3),
        max_running=st.integers(2, 6),
        max_step_tokens=st.sampled_from([1, 3, 8, 16, 32]),
        sizes=st.lists(st.integers(1, 9), min_size=len(DIGESTS), max_size=len(DIGESTS)),
        host_blocks=st.sampled_from([0, 0, 6, 15, 100]),
        num_drafts=st.sampled_from([0, 1, 4]),
    )
    def start(
        self,
        num_blocks: int,
        num_slots: int,
        block_tokens: int,
        max_running: int,
        max_step_tokens: int,
        sizes: list[int],
        host_blocks: int,
        num_drafts: int,
    ) -> None:
        self.sizes = dict(zip(DIGESTS, sizes, strict=True))
        self.arena = Arena(num_blocks)
        self.pool = AdapterPool(self.arena, num_slots)
        limits = SchedulerConfig(block_tokens, max_running, max_step_tokens)
        told = Told(lambda sequence: drafts_of(sequence, num_drafts))
        self.scheduler = Scheduler(self.arena, self.pool, limits, speculator=told)
        self.device = Device(block_tokens)
        self.disk = Disk(self.sizes)
        self.host: HostTier[Packed] = HostTier(host_blocks)
        self.inbox: list[Callable[[], None]] = []
        self.supply: Supply[Packed] = Supply(
            self.scheduler,
            self.device,
            self.disk,
            self.host,
            Quiet(),
            clock=lambda: 0.0,
            post=self.inbox.append,
            fail=self.fail_waiting,
        )
        self.live: list[Sequence] = []
        self.num_added = 0

    # Requests come and go.

    @precondition(lambda self: len(self.live) < 10)
    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests: list[Request]) -> None:
        for request in requests:
            self.num_added += 1
            sequence = request_of(f"r{self.num_added}", request)
            self.live.append(sequence)
            self.scheduler.add(sequence)

    @precondition(lambda self: len(self.live) > 3)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self.live.remove(sequence)
        self.scheduler.abort(sequence)

    # Adapters are read from disk and copied, or fail at either; they are pinned and deleted.

    @precondition(lambda self: self.disk.reads)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def read_ends(self, data: st.DataObject, fails: int) -> None:
        self.disk.end_read(data.draw(st.sampled_from(sorted(self.disk.reads))), fails == 4)

    @precondition(lambda self: self.disk.copies)
    @rule(data=st.data(), fails=st.integers(0, 4))
    def copy_ends(self, data: st.DataObject, fails: int) -> None:
        self.disk.end_copy(data.draw(st.integers(0, len(self.disk.copies) - 1)), fails == 4)

    def fail_waiting(self, version: str, error: RequestError) -> None:
        for sequence in self.scheduler.waiting.needing(version):
            self.live.remove(sequence)
            self.scheduler.abort(sequence)

    @rule(version=VERSIONS, owner=st.sampled_from(OWNERS))
    def pin(self, version: str, owner: str) -> None:
        self.supply.pin(version, owner, lambda error: None)

    @rule(version=VERSIONS, owner=st.sampled_from(OWNERS))
    def unpin(self, version: str, owner: str) -> None:
        self.supply.unpin(version, owner)

    @rule(version=VERSIONS)
    def forget(self, version: str) -> None:
        """Its last request and its name are gone, and so are the store's files."""
        if not any(version in sequence.versions for sequence in self.live):
            self.supply.forget(version)

    # Steps.

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.run_step()
            self.is_whole()

    @rule()
    def step_with_a_nan(self) -> None:
        self.run_step(num_nan=1)

    @rule(data=st.data())
    def step_that_is_decided_again(self, data: st.DataObject) -> None:
        """As adapters come while there is patience, and some requests go."""
        self.decide()
        self.end_all()
        if self.live:
            self.abort(data)
        self.run_step()

    def run_step(self, num_nan: int = 0) -> Step:
        """As the engine does."""
        step = self.decide()
        sampled: list[Drawn] = []
        for row in step.rows:
            drawn = self.device.run(row)
            if row.samples:
                sampled.append(() if len(sampled) < num_nan else drawn)
        self.take(step, sampled)
        return step

    def decide(self) -> Step:
        while self.inbox:
            self.inbox.pop(0)()
        self.is_whole()
        before = self.sight()
        step = self.scheduler.schedule(self.supply.size_of, now=0.0)
        self.check_rows(step)
        self.check_manners(step, *before)
        for load in step.loads:  # from now on, somebody else writes there
            self.device.blocks.update(dict.fromkeys(load.blocks, TORN))
        self.supply.carry_out(step)
        for bind in step.binds:
            self.device.bind_blend(bind.slot, bind.members)
        for sequence, error in step.failed:
            self.check_failure(sequence, error)
        return step

    def take(self, step: Step, sampled: list[Drawn]) -> None:
        for outcome in self.scheduler.update(step, sampled, now=0.0):
            sequence = outcome.sequence
            if not outcome.drawn:
                assert sequence.phase is Phase.FINISHED
                self.live.remove(sequence)
            elif outcome.finish is not None:
                self.live.remove(sequence)
                self.check_finished(sequence, outcome.finish)

    def sight(self) -> tuple[list[Sequence], set[str]]:
        """Who waits, and which pinned adapters are here."""
        pinned = {v for v in DIGESTS if self.pool.is_pinned(v) and self.pool.get(v) is not None}
        return list(self.scheduler.waiting), pinned

    def check_manners(self, step: Step, queue: list[Sequence], pinned: set[str]) -> None:
        assert all(self.pool.get(version) for version in pinned), "a pinned adapter had to go"
        limit = self.scheduler.config.max_running
        for index, sequence in enumerate(queue):
            if sequence.phase is not Phase.WAITING:
                continue
            assert sequence.num_overtaken < 2 * limit, "overtaken without end"
            started = [s for s in queue[index + 1 :] if s.phase is Phase.RUNNING]
            assert all(
                s.client != sequence.client for s in started if s.priority == sequence.priority
            )
            held = not sequence.is_overtakable and all(s.is_overtakable for s in queue[:index])
            assert not held or all(s.priority == sequence.priority for s in started)
        assert list(step.wanted) == list(dict.fromkeys(step.wanted)), "wanted twice"

    def check_rows(self, step: Step) -> None:
        rows = step.rows
        assert sum(row.num_tokens for row in rows) <= self.scheduler.config.max_step_tokens
        assert len({row.sequence.request_id for row in rows}) == len(rows)
        order = [
            (row.num_tokens > 1, -1 if (s := row.sequence.slot) is None else s) for row in rows
        ]
        assert order == sorted(order), "decode first, then by slot"
        left = self.scheduler.config.max_step_tokens - sum(row.num_tokens for row in rows)
        assert not left or all(row.samples for row in rows), "tokens are left, and nobody gets them"
        running = self.scheduler.running
        assert not left or len(rows) == len(running) or step.num_preempted, "one that runs is idle"
        for row in rows:
            assert row.num_tokens > 0
            assert row.sequence.phase is Phase.RUNNING
            assert row.start == row.sequence.num_computed
            end = row.sequence.num_tokens + len(row.drafts)
            assert row.samples == (row.start + row.num_tokens == end)
            limit = row.sequence.stop.max_tokens - len(row.sequence.output_token_ids)
            assert len(row.drafts) < limit, "drafts beyond the last token"

    def check_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Only what would not fit beside the pins fails, for the reason that is true."""
        self.live.remove(sequence)
        pinned = self.pool.pinned_room()
        others = [version for version in sequence.versions if not self.pool.is_pinned(version)]
        blocks = self.scheduler.kv.blocks_for(sequence.num_tokens) + pinned.blocks
        blocks += sum(self.sizes[version] for version in others)
        slots = len(others) + bool(sequence.blend) + pinned.slots
        fits = blocks <= self.arena.num_blocks and slots <= self.pool.num_slots
        assert not fits, error.message
        if error.reason.name == "EXCEEDS_KV_CAPACITY":
            assert not sequence.output_token_ids
            assert not self.fits_alone(sequence), "it fits as soon as a pin goes"
        else:
            assert error.reason.name == "OUT_OF_MEMORY"
            assert sequence.output_token_ids or error.retry_after is not None

    def fits_alone(self, sequence: Sequence) -> bool:
        blocks = self.scheduler.kv.blocks_for(sequence.num_tokens)
        blocks += sum(self.sizes[version] for version in sequence.versions)
        slots = len(sequence.versions) + bool(sequence.blend)
        return blocks <= self.arena.num_blocks and slots <= self.pool.num_slots

    def check_finished(self, sequence: Sequence, reason: FinishReason) -> None:
        assert sequence.output_token_ids == text_of(sequence)
        stopped = sequence.output_token_ids[-1] == STOP
        assert reason is (FinishReason.STOP_TOKEN if stopped else FinishReason.LENGTH)

    @invariant()
    def is_whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        self.host.check_integrity()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= self.scheduler.config.max_running
        assert {id(s) for s in self.live} == {id(s) for s in [*running, *waiting]}
        for sequence in self.live:
            expected = text_of(sequence)[: len(sequence.output_token_ids)]
            assert sequence.output_token_ids == expected

    def teardown(self) -> None:
        """Nobody starves: left alone, everything ends, and memory comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(MAX_DRAIN_STEPS):
            if not self.live:
                break
            step = self.run_step()
            under_way = self.disk.reads or self.disk.copies or self.inbox
            stirs = step.rows or step.failed or step.num_preempted or under_way
            assert stirs or not self.live, f"nothing is under way: {self.scheduler}"
            self.end_all()
        assert not self.live, f"a sequence starves: {self.scheduler}"
        assert self.arena.count(Use.KV) == 0
        for version in DIGESTS:
            for owner in OWNERS:
                self.supply.unpin(version, owner)
        for _ in range(3):  # a read, a copy, and what comes of it
            self.end_all()
            self.run_step()
        for version in DIGESTS:
            self.supply.forget(version)
        assert self.arena.num_free == self.arena.num_blocks
        assert len(self.host) == 0
        assert repr(self.pool) == f"AdapterPool(0/{self.pool.num_slots}: )"

    def end_all(self) -> None:
        for digest in list(self.disk.reads):
            self.disk.end_read(digest, fails=False)
        while self.disk.copies:
            self.disk.end_copy(0, fails=False)


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)
# Shrinking a failure may take hypothesis five minutes.
TestScheduler = pytest.mark.timeout(600)(SchedulerMachine.TestCase)
