"""A scheduler with a fake model, for tests that say what it decides."""

from collections.abc import Mapping

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena
from loraplex.engine.pace import Pace
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import BlendPart, SamplingParams, Sequence, StopParams
from loraplex.engine.step import Outcome, Sampled, Step

BLOCK_TOKENS = 4
STOP = 99


class Rig:
    """A scheduler whose model always draws token 1, and its steps as text."""

    def __init__(
        self,
        num_blocks: int = 100,
        num_slots: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 64,
        pace: Pace | None = None,
        prefix_cache: bool = False,
    ) -> None:
        self.arena = Arena(num_blocks)
        self.pool = AdapterPool(self.arena, num_slots)
        limits = SchedulerConfig(BLOCK_TOKENS, max_running, max_step_tokens, prefix_cache)
        self.scheduler = Scheduler(self.arena, self.pool, limits, pace)
        self.now = 0.0

    def add(
        self,
        name: str,
        num_prompt: int,
        digest: str | None = None,
        max_tokens: int = 50,
        *,
        tenant: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> Sequence:
        """A digest of several letters is a blend of them."""
        stop = StopParams(max_tokens, stop_token_ids=frozenset({STOP}))
        blend = tuple(BlendPart(v, 0.5) for v in digest) if digest and len(digest) > 1 else ()
        sequence = Sequence(name, [0] * num_prompt, SamplingParams(), stop, digest, blend=blend)
        sequence.tenant, sequence.priority, sequence.deadline = tenant, priority, deadline
        sequence.submitted_at = self.now
        self.scheduler.add(sequence)
        return sequence

    def resident(self, digest: str, num_blocks: int = 2) -> int:
        load = self.pool.reserve(digest, num_blocks)
        assert load is not None
        self.pool.loaded(digest)
        return load.slot

    def pinned(self, digest: str, num_blocks: int) -> None:
        assert self.pool.pin(digest, "name", num_blocks)

    def loaded(self, digests: str) -> None:
        for digest in digests:
            self.scheduler.loaded(digest, self.now)

    def residents(self) -> str:
        return "".join(v for v in "abcdefuvwxyz" if self.pool.get(v) is not None)

    def schedule(self, adapter_blocks: Mapping[str, int] | None = None) -> Step:
        self.now += 1.0
        step = self.scheduler.schedule((adapter_blocks or {}).get, self.now)
        self.scheduler.check_integrity()
        return step

    def update(self, step: Step, token_id: int | None = 1) -> list[Outcome]:
        draw = () if token_id is None else (Sampled(token_id),)
        drawn = [draw for row in step.rows if row.samples]
        outcomes = self.scheduler.update(step, drawn, self.now)
        self.scheduler.check_integrity()
        return outcomes

    def step(self, adapter_blocks: Mapping[str, int] | None = None) -> str:
        step = self.schedule(adapter_blocks)
        self.update(step)
        return shown(step)

    def steps(self, count: int) -> list[str]:
        return [self.step() for _ in range(count)]


def shown(step: Step) -> str:
    """Rows as name:start+count, with a star where a token is drawn; then what else was decided."""
    parts = [
        f"{row.sequence.request_id}:{row.start}+{row.num_tokens}{'*' if row.samples else ''}"
        for row in step.rows
    ]
    parts += [f"load {load.digest}" for load in step.loads]
    urgent, others = step.wanted[: step.num_urgent], step.wanted[step.num_urgent :]
    parts += [f"bind {'+'.join(str(slot) for slot, _ in bind.members)}" for bind in step.binds]
    parts += [f"need {digest}" for digest in urgent]
    parts += [f"want {digest}" for digest in others]
    parts += [f"fail {s.request_id} {error.reason.name}" for s, error in step.failed]
    parts += ["preempt"] * step.num_preempted
    parts += ["evict"] * step.num_evicted
    return ", ".join(parts)
