"""The books of the scheduler: who waits, who runs, and what those hold. Pure."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from loraplex.adapters.pool import AdapterPool, Bind, Load
from loraplex.engine.displacement import Places
from loraplex.engine.fair_share import FairShare
from loraplex.engine.fitting import SizeOf
from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import Client, Phase, Sequence
from loraplex.engine.step import Scheduled
from loraplex.engine.waiting import WaitingQueue
from loraplex.errors import RequestError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue."""

    block_tokens: int  # tokens whose KV fits one block
    max_running: int
    max_step_tokens: int
    prefix_cache: bool = False  # keep the KV of full blocks for those who begin alike


@dataclass(slots=True)
class Plan:
    """A step while it is being decided."""

    size_of: SizeOf
    now: float
    places: Places
    budget: int
    extra: int = 0  # of the budget, for the prompts of those clients alone who pay for it
    paying: Collection[Client] = ()
    rows: list[Scheduled] = field(default_factory=list)
    prefilling: dict[Sequence, int] = field(default_factory=dict)  # running; prompt tokens to go
    asking: Sequence | None = None  # one of those who wait, for whom another gave way
    needy: Sequence | None = None  # the first of those who wait that lacks an adapter
    binds: list[Bind] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    failed: list[tuple[Sequence, RequestError]] = field(default_factory=list)
    num_preempted: int = 0  # for memory
    num_displaced: int = 0

    def join(self, sequence: Sequence) -> None:
        """It runs from this step on."""
        self.places.take(sequence.client)
        self.prefill(sequence)

    def prefill(self, sequence: Sequence) -> None:
        """It runs, and has a prompt to be computed."""
        num_tokens = sequence.num_tokens - sequence.num_computed
        self.prefilling[sequence] = num_tokens
        self.places.pending[sequence.client] += num_tokens

    def leave(self, sequence: Sequence) -> None:
        """It runs no more."""
        self.places.give_up(sequence.client)
        self.places.pending[sequence.client] -= self.prefilling.pop(sequence, 0)


class Roster:
    """Every sequence stands in one of them, and holds blocks, a slot and references only while it
    runs.

    Mutable: `waiting`; `running`, in order of admission; `fair`, what each client was served.
    """

    def __init__(self, pool: AdapterPool, config: SchedulerConfig) -> None:
        self.pool = pool
        self.config = config
        self.kv = KVMemory(pool.arena, pool, config.block_tokens, config.prefix_cache)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.fair = FairShare()
        pool.awaited = self.waiting.versions

    @property
    def is_full(self) -> bool:
        """Whether all places are taken."""
        return len(self.running) >= self.config.max_running

    def has_adapters(self, sequence: Sequence) -> bool:
        """Whether all of them are on the device."""
        return all(self.pool.is_ready(version) for version in sequence.versions)

    def add(self, sequence: Sequence) -> None:
        self.fair.enter(sequence.client, self.waiting.clients)
        self.waiting.add(sequence)
        if sequence.digest is not None and self.has_adapters(sequence):
            sequence.adapter_ready_at = sequence.submitted_at

    def start(self, sequence: Sequence, keep: set[str], plan: Plan) -> bool:
        """Give a waiting sequence its blocks and adapter; False if there is no room."""
        digest = sequence.digest
        is_unbound = digest is not None and self.pool.get(digest) is None
        if not self.kv.start(sequence, int(is_unbound), keep):
            return False
        if digest is not None and is_unbound:
            bind = self.pool.bind(digest, sequence.blend, keep)
            assert bind is not None, "room was made that is not there"
            plan.binds.append(bind)
        self._unqueue(sequence)
        if digest is not None:
            sequence.slot = self.pool.acquire(digest)
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)
        if sequence.admitted_at is None:
            sequence.admitted_at = plan.now
        plan.join(sequence)
        return True

    def preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Back to the head of its client's queue; its KV is computed anew when there is room."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self.waiting.put_back(sequence)
        plan.leave(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands, and everything it held back. Idempotent."""
        if sequence.phase is Phase.FINISHED:
            return
        if sequence.phase is Phase.WAITING:
            self._unqueue(sequence)
        else:
            self.running.remove(sequence)
            self._release(sequence)
        self.fair.leave(sequence.client)
        sequence.phase = Phase.FINISHED

    def check_integrity(self) -> None:
        self.pool.arena.check_integrity()
        self.pool.check_integrity()
        self.kv.check_integrity(self.running)
        self.waiting.check_integrity()
        self.fair.check_integrity(Counter(s.client for s in (*self.running, *self.waiting)))
        uses = Counter(digest for sequence in self.running for digest in needs(sequence))
        assert uses == self.pool.references(), "references and running sequences disagree"
        assert len(self.running) <= self.config.max_running, "more run than there are places"
        for sequence in self.waiting:
            assert sequence.phase is Phase.WAITING, "one that does not wait is in the queue"
            assert not sequence.block_table, "one that waits holds blocks"
            assert sequence.slot is None, "one that waits holds a slot"

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        if sequence.client not in self.waiting.clients:
            self.fair.last_left(sequence.client)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        if sequence.slot is not None:
            assert sequence.digest is not None
            self.pool.release(sequence.digest)
            sequence.slot = None


def needs(sequence: Sequence) -> set[str]:
    """What it holds on the device while it runs: its adapters, and its blend."""
    return set(sequence.versions) | ({sequence.digest} if sequence.digest is not None else set())
