"""A server in simulated time: the real scheduler over a device whose steps cost what a model says.

A step's time is linear in what it computes and reads, with figures such as a small model has on two
cores. Adapters come at once where there is room. Requests arrive at given times; everything that
happens is a function of them and of the seed.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena
from loraplex.engine.pace import Pace
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.step import Sampled, Step, StepLoad, load_of

BLOCK_TOKENS = 16
SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: when it comes, whose it is, how long."""

    at: float
    client: str  # an adapter; "": the bare base
    prompt: int = 64
    output: int = 64
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: of a step, and of each thing in it."""

    step: float = 6e-3
    stream: float = 0.13e-3
    token: float = 0.14e-3
    context: float = 0.045e-6  # a token that a row reads
    adapter: float = 0.1e-3  # each distinct one

    def of(self, load: StepLoad, num_adapters: int) -> float:
        rows = self.step + self.stream * load.num_decode + self.token * load.num_prefill
        read = self.context * (load.context + load.prefill_context)
        return rows + read + self.adapter * num_adapters


@dataclass(slots=True)
class Fate:
    """What became of a request, in simulated seconds."""

    ask: Ask
    times: list[float] = field(default_factory=list)  # of its tokens

    @property
    def ttft(self) -> float:
        return self.times[0] - self.ask.at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Simulation:
    """Mutable: the clock, and the records."""

    def __init__(
        self,
        max_running: int = 32,
        num_blocks: int = 4000,
        costs: Costs = Costs(),
        paced: bool = True,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        arena = Arena(num_blocks)
        self.pool = AdapterPool(arena, num_slots=256)
        limits = SchedulerConfig(BLOCK_TOKENS, max_running, max_step_tokens=512)
        self.scheduler = Scheduler(arena, self.pool, limits, Pace(SHARE) if paced else None)
        self.now = 0.0
        self.fates: dict[Sequence, Fate] = {}
        self.service: dict[str, list[tuple[float, float]]] = defaultdict(list)  # (when, how much)
        self.num_adapters: list[int] = []  # of each step
        self.num_preempted = 0
        self._costs = costs
        self._noise = noise
        self._random = random.Random(seed)

    def run(self, asks: Iterable[Ask], until: float | None = None) -> list[Fate]:
        """In the order of arrival. Until then, or until all have ended."""
        coming = sorted(asks, key=lambda ask: ask.at, reverse=True)
        while until is None or self.now < until:
            while coming and coming[-1].at <= self.now:
                self._add(coming.pop())
            step = self.scheduler.schedule(lambda _: 1, self.now)
            for load in step.loads:
                self.scheduler.loaded(load.digest, self.now)
            self.num_preempted += step.num_preempted
            if step.rows:
                self._execute(step)
            elif coming and not step.loads and not step.num_preempted:
                self.now = coming[-1].at
            elif not step.loads and not step.num_preempted:
                break
        return list(self.fates.values())

    def _add(self, ask: Ask) -> None:
        digest = ask.client or None
        name = f"r{len(self.fates)}"
        stop = StopParams(ask.output)
        sequence = Sequence(name, [0] * ask.prompt, SamplingParams(), stop, digest)
        sequence.priority, sequence.submitted_at = ask.priority, ask.at
        self.fates[sequence] = Fate(ask)
        self.scheduler.add(sequence)

    def _execute(self, step: Step) -> None:
        load = load_of(step.rows)
        num_adapters = len({row.sequence.digest for row in step.rows} - {None})
        seconds = self._costs.of(load, num_adapters) * (1 + abs(self._random.gauss(0, self._noise)))
        self.now += seconds
        self.num_adapters.append(num_adapters)
        served = Counter[str]()
        for row in step.rows:
            served[row.sequence.digest or ""] += 2 if row.is_decode else row.num_tokens
        for client, amount in served.items():
            self.service[client].append((self.now, amount))
        self.scheduler.learn(step, seconds)
        drawn = [(Sampled(1),) for row in step.rows if row.samples]
        for outcome in self.scheduler.update(step, drawn, self.now):
            self.fates[outcome.sequence].times.append(self.now)


def poisson(
    rate: float, seconds: float, client: str, seed: int, prompt: int = 64, output: int = 64
) -> list[Ask]:
    """So many a second, independently of each other."""
    source = random.Random(f"{client} {seed}")
    asks, now = [], source.expovariate(rate)
    while now < seconds:
        asks.append(Ask(now, client, prompt, output))
        now += source.expovariate(rate)
    return asks


def quantile(values: Iterable[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def jain(values: Seq[float]) -> float:
    """1 when all are alike, 1/n when one has everything: Jain, Chiu and Hawe (1984)."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))
