"""Who runs in the next step, with how many tokens, and who gets memory. Pure: no device, no clock.

A step is a list of `Scheduled` rows. Streams come first, one token each. Then new sequences are
admitted, with blocks for all their tokens so far, and only when their adapters are resident. What
`Pace` leaves of the budget goes to prompts, in chunks, divided evenly among clients.

    priority       the higher goes first in everything, and never the other way round
    fair share     of one priority the client that was served least: see `fair_share`
    by adapter     where clients were served about the same, those whose adapters run already, then
                   those whose adapters are resident: fewer bytes are read in a step

One whose adapter is on its way is passed over. One that waits for memory is too, by as many as
there are places; then it holds back those behind it, so that nobody starves. Memory that is missing
comes from what is idle in the pool (for one who waits, never what somebody before it asks for), and
for those that run already from the last of the running: see `displacement`, which also says whose
place one that waits may have. Those who had to give way are the next of their clients, and compute
their KV anew.

So a sequence can lose its adapter to the running ones before it starts; then nobody overtakes it
any more. Adapters are read from disk for all who wait, from the moment they arrive (`Step.wanted`),
and copied ahead for those who wait only for a place among the running.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from itertools import islice

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.admission import GROUPED, Admission
from loraplex.engine.arena import Arena
from loraplex.engine.displacement import Places
from loraplex.engine.fitting import SizeOf, out_of_memory
from loraplex.engine.pace import Pace
from loraplex.engine.prefill import split
from loraplex.engine.roster import Plan, Roster, SchedulerConfig, needs
from loraplex.engine.sequence import Client, FinishReason, Phase, Sequence
from loraplex.engine.speculation import Speculator
from loraplex.engine.step import Drawn, Outcome, Scheduled, Step, load_of
from loraplex.errors import RequestError

__all__ = ["Scheduler", "SchedulerConfig"]

MAX_WEIGHT = 4.0
"""So many times the usual part of a step prompts may have that go before the streams, or that are
soon over, of many clients."""

MAX_BURST = 16.0
"""And at most so many times where each client with streams has others that wait."""

SOON_OVER = 128
"""Tokens left of a prompt, at most, that counts as such."""

SETTLED = 8
"""Tokens of a stream: the gaps before may be long, so that those who come together begin so."""


class Scheduler:
    """Mutable: the books, which are the roster's, and the pace as it learns."""

    def __init__(
        self,
        arena: Arena,
        pool: AdapterPool,
        config: SchedulerConfig,
        pace: Pace | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """`pace`: bounds the prompts beside streams by time; None: by `max_step_tokens` alone.

        `speculator`: adds drafts to rows of streams; None: there are none.
        """
        self.arena = arena
        self.pool = pool
        self.config = config
        self.pace = pace
        self.speculator = speculator
        self.roster = Roster(pool, config)
        self.kv = self.roster.kv
        self.waiting = self.roster.waiting
        self.running = self.roster.running
        self._admission = Admission(self.roster)

    def add(self, sequence: Sequence) -> None:
        self.roster.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it stands, and everything it held back. Idempotent."""
        self.roster.abort(sequence)

    def loaded(self, version: str, now: float) -> None:
        """An adapter that was on its way is there."""
        self.pool.loaded(version)
        for sequence in self.waiting.needing(version):
            if sequence.adapter_ready_at is None and self.roster.has_adapters(sequence):
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

    def schedule(self, size_of: SizeOf, now: float) -> Step:
        """Decide the next step."""
        num_evicted = self.pool.num_evicted
        plan = self._begin(size_of, now)
        if self.waiting and not self.pool.missing_pins:
            self._displace(plan)
        self._stream(plan)
        if not plan.num_preempted and self._admission.load_pinned(plan):
            self._admission.admit(plan)
        self._prefill(plan)
        if self.pool.num_evicted > num_evicted:
            self._admission.wait_anew()
        rows = [row for row in plan.rows if row.sequence.phase is Phase.RUNNING]
        if self.speculator is not None:
            rows = self.speculator.extend(rows, plan.budget, len(self.running), self.kv)
        rows.sort(key=_row_order)
        urgent, others = self._admission.wanted(plan)
        return Step(
            rows=tuple(rows),
            binds=tuple(plan.binds),
            loads=tuple(plan.loads),
            wanted=(*urgent, *others),
            num_urgent=len(urgent),
            failed=tuple(plan.failed),
            num_preempted=plan.num_preempted + plan.num_displaced,
            num_evicted=self.pool.num_evicted - num_evicted,
        )

    def update(self, step: Step, drawn: Seq[Drawn], now: float) -> list[Outcome]:
        """Take in what a step computed: `drawn` is parallel to the rows that sample."""
        outcomes = []
        draws = iter(drawn)
        for row in step.rows:
            sequence = row.sequence
            tokens = next(draws) if row.samples else ()
            num_confirmed = max(1, len(tokens)) - 1
            num_rejected = len(row.drafts) - num_confirmed
            if row.drafts and self.speculator is not None:
                self.speculator.learn(row, num_confirmed)
            sequence.num_computed = row.start + row.num_tokens - num_rejected
            self.kv.commit(sequence)
            self._charge(row, len(tokens))
            if row.samples:
                outcomes.append(self._take(sequence, tokens, now))
        return outcomes

    def learn(self, step: Step, seconds: float) -> None:
        """A step's forward pass took so long."""
        if self.pace is not None:
            self.pace.learn(load_of(step.rows), seconds)
        if self.speculator is not None:
            self.speculator.timed(step.rows, seconds)

    def check_integrity(self) -> None:
        self.roster.check_integrity()

    def __repr__(self) -> str:
        running = ", ".join(f"{s.request_id}:{s.num_computed}" for s in self.running)
        waiting = ", ".join(s.request_id for s in self.waiting)
        return f"Scheduler(running [{running}], waiting [{waiting}], {self.arena!r}, {self.pool!r})"

    # Those that run.

    def _begin(self, size_of: SizeOf, now: float) -> Plan:
        held = Counter(sequence.client for sequence in self.running)
        places = Places(self.roster.fair, held, Counter())
        plan = Plan(size_of, now, places, self.config.max_step_tokens)
        for sequence in self.waiting.late(now):
            plan.failed.append((sequence, _too_late()))
            self.abort(sequence)
        for sequence in self.running:
            if _is_prefilling(sequence):
                self.kv.catch_up(sequence)
                plan.prefill(sequence)
        return plan

    def _displace(self, plan: Plan) -> None:
        """Have one that runs give way to the first of those who wait, where that one may ask it."""
        least = min(map(plan.places.served, self.waiting.clients))
        priority = self.waiting.priority
        assert priority is not None, "nobody asks"
        if not plan.places.may_any_displace(priority, self.running, least):
            return
        asking = self._first_ready(plan)
        if asking is None or not self._admission.may_start(asking, plan):
            return
        candidates = [s for s in self.running if plan.places.may_displace(asking, s)]
        if not candidates:
            return
        if not self.roster.is_full:
            missing = self.kv.blocks_for(asking.num_tokens) - self.pool.room(needs(asking)).blocks
            if not 0 < missing <= self._num_freed(candidates):
                return
        last = plan.places.last(candidates)
        last.num_displaced += last.priority == asking.priority
        self.roster.preempt(last, plan)
        plan.num_displaced += 1
        plan.asking = asking

    def _num_freed(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that nobody holds any more once all of these are gone."""
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        nodes = [(self.pool.prefixes.at(block), count) for block, count in held.items()]
        return sum(node is None or node.references == count for node, count in nodes)

    def _first_ready(self, plan: Plan) -> Sequence | None:
        """The first that waits for a place or for memory alone, among as many as places."""
        waiting = islice(self._admission.in_order(plan), self.config.max_running)
        return next((sequence for sequence in waiting if self.roster.has_adapters(sequence)), None)

    def _stream(self, plan: Plan) -> None:
        """A token for each stream; those that would give way first come last."""
        streams = [sequence for sequence in self.running if sequence not in plan.prefilling]
        if self.arena.num_free < len(streams) or plan.budget < len(streams):  # else all get theirs
            streams.sort(key=lambda s: (-s.priority, plan.places.served(s.client)))
        for sequence in streams:
            if sequence.phase is Phase.RUNNING:  # not preempted for one before it
                self._continue(sequence, 1, plan)
        if plan.rows and self.pace is not None:
            self._slow_down(self.pace, plan)

    def _slow_down(self, pace: Pace, plan: Plan) -> None:
        """Bound the prompt tokens beside the streams.

        More of them where prompts have the higher priority. More for prompts that are soon over, as
        often as there are clients who have one. More also for the clients of streams, by how many
        more they have that wait for their first token: nobody else pays for that. As many as there
        are where no stream is older than a few tokens, nor of a higher priority.
        """
        streams = [row.sequence for row in plan.rows]
        top = max(sequence.priority for sequence in streams)
        are_new = all(len(stream.output_token_ids) <= SETTLED for stream in streams)
        if are_new and all(sequence.priority >= top for sequence in plan.prefilling):
            return
        load = load_of(plan.rows)
        position = max((s.num_computed for s in plan.prefilling), default=0)

        def budget(weight: float) -> int:
            return min(plan.budget, pace.budget(load, position, weight))

        if any(sequence.priority > top for sequence in plan.prefilling):
            plan.budget = budget(MAX_WEIGHT)
            return
        allowed = budget(1.0)
        short = {s: left for s, left in plan.prefilling.items() if left <= SOON_OVER}
        weight = min(MAX_WEIGHT, len({sequence.client for sequence in short}))
        if weight > 1:
            allowed = min(budget(weight), allowed + sum(short.values()))
        num_streams = Counter(sequence.client for sequence in streams)
        most = budget(self._burst(num_streams, plan))
        plan.extra, plan.paying = max(0, most - allowed), num_streams.keys()
        plan.budget = allowed + plan.extra

    def _burst(self, num_streams: Mapping[Client, int], plan: Plan) -> float:
        """A weight: at least 1, and 1 where one of the clients has no more to come."""
        prefilling = Counter(sequence.client for sequence in plan.prefilling)
        num_free = self.config.max_running - len(self.running)
        free = num_free / max(1, len(self.waiting.clients))
        ratio = min(
            (prefilling[client] + min(self.waiting.count(client), free)) / count
            for client, count in num_streams.items()
        )
        return min(MAX_BURST, (1 + ratio) ** 2)

    def _continue(self, sequence: Sequence, num_tokens: int, plan: Plan) -> None:
        num_tokens = min(num_tokens, plan.budget)
        if num_tokens and self._grow(sequence, sequence.num_computed + num_tokens, plan):
            self._schedule(sequence, num_tokens, plan)

    def _schedule(self, sequence: Sequence, num_tokens: int, plan: Plan) -> None:
        start = sequence.num_computed
        samples = start + num_tokens == sequence.num_tokens
        plan.rows.append(Scheduled(sequence, start, num_tokens, samples))
        plan.budget -= num_tokens

    def _prefill(self, plan: Plan) -> None:
        """What is left of the budget, for prompts; of one client the first come goes first."""
        groups: dict[int, dict[Client, list[Sequence]]] = {}
        for sequence in plan.prefilling:
            if sequence.phase is Phase.RUNNING:
                clients = groups.setdefault(sequence.priority, {})
                clients.setdefault(sequence.client, []).append(sequence)
        for priority in sorted(groups, reverse=True):
            clients = groups[priority]
            counters = self.roster.fair.counters
            order = sorted(clients, key=counters.__getitem__)
            needs = [
                sum(s.num_tokens - s.num_computed for s in clients[client]) for client in order
            ]
            alike = counters[order[0]] + GROUPED
            num_first = sum(counters[client] < alike for client in order)
            for client, grant in zip(order, _grants(plan, order, needs, num_first), strict=True):
                for sequence in clients[client]:
                    assert sequence.phase is Phase.RUNNING, "it has had its blocks from the start"
                    num_tokens = min(grant, sequence.num_tokens - sequence.num_computed)
                    self._continue(sequence, num_tokens, plan)
                    grant -= num_tokens

    def _grow(self, sequence: Sequence, num_tokens: int, plan: Plan) -> bool:
        """Blocks for `num_tokens` of a running sequence: what is idle goes, then the last one.

        One that runs alone fails, unless an adapter on its way holds what it could have later.
        """
        while (evicted := self.kv.grow(sequence, num_tokens)) is None:
            if len(self.running) == 1 and not self.pool.is_loading:
                plan.failed.append((sequence, out_of_memory()))
                self.abort(sequence)
                return False
            last = plan.places.last(self.running)
            self.roster.preempt(last, plan)
            plan.num_preempted += 1
            if last is sequence:
                return False
        self._hold_the_line(evicted)
        return True

    def _hold_the_line(self, evicted: Iterable[str]) -> None:
        for version in evicted:
            for sequence in self.waiting.needing(version):
                sequence.is_overtakable = False

    # Small change.

    def _take(self, sequence: Sequence, drawn: Drawn, now: float) -> Outcome:
        if not drawn:
            self.kv.discard(sequence)
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

    def _charge(self, row: Scheduled, num_output: int) -> None:
        """What is computed anew after a preemption is not charged again."""
        sequence = row.sequence
        num_prompt = 0
        if row.start < len(sequence.prompt_token_ids):
            end = min(row.start + row.num_tokens, len(sequence.prompt_token_ids))
            num_prompt = max(0, end - max(row.start, sequence.num_charged))
            sequence.num_charged = max(sequence.num_charged, end)
        self.roster.fair.charge(sequence.client, num_prompt, num_output)


def _grants(plan: Plan, clients: Seq[Client], needs: Seq[int], num_first: int) -> list[int]:
    """Tokens for each; what is extra goes to those who pay for it alone."""
    grants = split(plan.budget - plan.extra, needs, num_first)
    left = [
        need - grant if client in plan.paying else 0
        for client, need, grant in zip(clients, needs, grants, strict=True)
    ]
    extra = split(plan.extra, left)
    plan.extra -= sum(extra)
    return [grant + more for grant, more in zip(grants, extra, strict=True)]


def _is_prefilling(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_computed > 1


def _row_order(row: Scheduled) -> tuple[bool, int]:
    slot = row.sequence.slot
    return (row.num_tokens > 1, -1 if slot is None else slot)


def _too_late() -> RequestError:
    return RequestError("DEADLINE_EXCEEDED", "the deadline passed while the request waited")
