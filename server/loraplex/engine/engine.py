"""The engine: one thread that decides, runs and hands out, a step at a time.

    submit, abort      from the event loop, into the inbox
    _step              schedule -> run -> update, on the engine thread; schedule again where an
                       adapter comes in time to join
    _deliver           back on the event loop, into each request's stream

All state of scheduler, arena, pool and host tier changes on the engine thread; `_streams` and
`_asked` on the event loop.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Generic, Protocol

from loraplex.adapters.tiers import HostTier, Tier
from loraplex.engine.arena import Use
from loraplex.engine.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from loraplex.engine.intake import Intake
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Finished, Phase, Sequence, Tokens
from loraplex.engine.step import Drawn, Outcome, Scheduled, Step
from loraplex.engine.stream import Event, TokenStream
from loraplex.engine.supply import Device, Loader, LoadObserver, P, P_contra, Supply
from loraplex.errors import RequestError

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 8
"""So many steps in a row that raise are no longer the requests' fault: the engine ends."""

PATIENCE = 0.1
"""Such a part of the last step's time may pass before the next one while adapters come that have
just been sent for. Most need far less, and what misses a step waits for the whole of it."""


class Runner(Device[P_contra], Protocol[P_contra]):
    """The device."""

    def run(self, rows: Seq[Scheduled]) -> list[Drawn]: ...


@dataclass(frozen=True, slots=True)
class EngineState:
    """How full the engine is."""

    num_running: int
    num_waiting: int
    kv_blocks: int
    adapter_blocks: int
    cached_blocks: int  # KV that no running request reads
    free_blocks: int
    resident_adapters: int
    host_adapters: int
    prefix_queries: int  # since the start, in tokens; see `PrefixStats`
    prefix_hits: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one forward pass did: rows are its sequences, parallel in the tuples."""

    number: int
    started_at: float  # seconds since the epoch
    duration: float  # seconds, scheduling and sampling included
    request_ids: tuple[str, ...]
    digests: tuple[str | None, ...]
    num_tokens: tuple[int, ...]  # drafts among them; 1 without them: a decode row
    num_drafts: tuple[int, ...]  # tokens that were guessed
    num_confirmed: int  # so many of all of them were right
    num_sampled: int
    num_preempted: int


class Observer(LoadObserver, Protocol):
    """Is told of every step, on the engine thread; must be quick."""

    def on_step(self, record: StepRecord) -> None: ...
    def on_state(self, state: EngineState) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the queue and of one stream."""

    max_live: int  # requests running and waiting
    stream_limit: int = 4096  # tokens a client may leave unread


class Engine(Generic[P]):
    """See the module's docstring. Built on the event loop that will use it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[P],
        loader: Loader[P],
        host: HostTier[P],
        observer: Observer,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._host = host
        self._observer = observer
        self._config = config
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        # The event loop's.
        self._intake = Intake(config.max_live, scheduler.config.max_running)
        self._streams: dict[str, TokenStream] = {}
        self._asked: set[asyncio.Future[None]] = set()
        self._is_closed = False  # to new requests
        self.crashed = asyncio.Event()  # set when the thread ended by itself: nothing runs any more
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # The engine thread's.
        self._live: dict[str, Sequence] = {}
        self._supply = Supply(
            scheduler, runner, loader, host, observer, clock, self._inbox.put, self._fail_waiting
        )
        self._num_steps = 0
        self._num_failed = 0  # in a row
        self._last_run = 0.0  # seconds
        self._served = 0.0  # while somebody waited, and not told of yet; and the seconds it took
        self._served_in = 0.0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> TokenStream:
        """Queue a request; its events come from the stream. Raises RequestError when refused."""
        if self._is_closed:
            raise RequestError("DRAINING", "the server is shutting down", retry_after=5.0)
        if sequence.request_id in self._streams:
            raise RequestError(
                "REQUEST_ID_IN_USE", f"request {sequence.request_id} is still running"
            )
        sequence.submitted_at = self._clock()
        self._intake.enter(sequence, sequence.submitted_at)
        stream = TokenStream(sequence, self._config.stream_limit, self._clock, self.abort)
        self._streams[sequence.request_id] = stream
        self._inbox.put(partial(self._add, sequence))
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request; what it held is free before the next step. Idempotent."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._intake.leave(stream.sequence)
            self._inbox.put(partial(self._abort, request_id))

    def residency(self, version: str) -> Tier:
        """The fastest place that holds a version. A glimpse: it may change at the next step."""
        if self._scheduler.pool.is_ready(version):
            return Tier.DEVICE
        return Tier.HOST if version in self._host else Tier.DISK

    async def pin(self, version: str, adapter_id: str) -> None:
        """Keep a version on the device for this name, bringing it there when there is room.

        Comes back once that is agreed on. Raises PINS_EXCEED_MEMORY, or why it cannot be read.
        Idempotent.
        """
        await self._ask(partial(self._supply.pin, version, adapter_id))

    def unpin(self, version: str, adapter_id: str) -> None:
        """The name asks no more, and takes a `pin` back that is still under way. Idempotent."""
        self._inbox.put(partial(self._supply.unpin, version, adapter_id))

    def forget(self, version: str) -> None:
        """The version's files are gone: its copies in memory go with their last use."""
        self._inbox.put(partial(self._supply.forget, version))

    async def check_integrity(self) -> None:
        """AssertionError when the books on memory do not add up."""
        await self._ask(self._check)

    @property
    def num_live(self) -> int:
        return len(self._streams)

    async def stop(self) -> None:
        """End the thread; requests still live get DRAINING."""
        self._end_streams(RequestError("DRAINING", "the server was shut down"))
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def _end_streams(self, error: RequestError) -> None:
        self._is_closed = True
        for stream in self._streams.values():
            stream.push(error)
            self._intake.leave(stream.sequence)
        self._streams.clear()
        for asked in self._asked:
            _settle(asked, error)

    async def _ask(self, work: Callable[[Callable[[Exception | None], None]], None]) -> None:
        """Have the engine thread do it, and wait for what it answers: nothing, or why not."""
        if self._is_closed:
            raise RequestError("DRAINING", "the server is shutting down", retry_after=5.0)
        asked = self._loop.create_future()
        self._asked.add(asked)

        def answer(error: Exception | None) -> None:
            self._loop.call_soon_threadsafe(_settle, asked, error)

        self._inbox.put(partial(work, answer))
        try:
            await asked
        finally:
            self._asked.discard(asked)

    def _run(self) -> None:
        busy = False
        try:
            while not self._is_stopping:
                self._drain_inbox(wait=not busy)
                busy = self._step()
        except Exception:
            log.exception("the engine failed")
            self._loop.call_soon_threadsafe(self._on_crash)

    def _on_crash(self) -> None:
        self._end_streams(RequestError("INTERNAL", "internal error"))
        self.crashed.set()

    def _drain_inbox(self, wait: bool) -> None:
        if wait:
            self._observer.on_state(self._state())
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _step(self) -> bool:
        """Schedule, run, update. False when nothing can change until something arrives."""
        started = self._clock()
        decided = [self._decide(started)]
        while decided[-1].rows and self._has_arrived(started):
            decided.append(self._decide(started))
        if decided[-1].rows:
            num_preempted = sum(step.num_preempted for step in decided)
            self._run_step(replace(decided[-1], num_preempted=num_preempted), started)
        return any(step.rows or step.failed or step.num_preempted for step in decided)

    def _decide(self, started: float) -> Step:
        """All that a step needs but its forward pass; can be decided again before that."""
        step = self._scheduler.schedule(self._supply.size_of, started)
        self._supply.carry_out(step)
        for bind in step.binds:
            self._runner.bind_blend(bind.slot, bind.members)
        self._send([self._fail(sequence, error) for sequence, error in step.failed])
        return step

    def _has_arrived(self, started: float) -> bool:
        """Whether anything did, for as long as there is patience with what this step sent for."""
        left = started + PATIENCE * self._last_run - self._clock()
        if left <= 0 or not self._supply.has_begun_since(started):
            return False
        try:
            self._inbox.get(timeout=left)()
        except Empty:
            return False
        self._drain_inbox(wait=False)
        return True

    def _run_step(self, step: Step, started: float) -> None:
        wall, began = time.time(), self._clock()
        try:
            drawn = self._runner.run(step.rows)
        except Exception:
            self._num_failed += 1
            if self._num_failed == MAX_FAILED_STEPS:
                raise
            log.exception("a step failed")
            error = RequestError("INTERNAL", "internal error")
            self._send([self._fail(row.sequence, error) for row in step.rows])
            return
        self._num_failed = 0
        now = self._clock()
        self._last_run = now - began
        self._scheduler.learn(step, self._last_run)
        if self._scheduler.waiting:
            self._count(step, drawn)
        outcomes = self._scheduler.update(step, drawn, now)
        self._num_steps += 1
        self._observer.on_step(
            StepRecord(
                number=self._num_steps,
                started_at=wall,
                duration=now - started,
                request_ids=tuple(row.sequence.request_id for row in step.rows),
                digests=tuple(row.sequence.digest for row in step.rows),
                num_tokens=tuple(row.num_tokens for row in step.rows),
                num_sampled=sum(map(len, drawn)),
                num_preempted=step.num_preempted,
                num_drafts=tuple(len(row.drafts) for row in step.rows),
                num_confirmed=sum(max(0, len(tokens) - 1) for tokens in drawn),
            )
        )
        self._observer.on_state(self._state())
        self._send([event for outcome in outcomes for event in self._events_of(outcome, now)])

    def _count(self, step: Step, drawn: Seq[Drawn]) -> None:
        """What a step did while somebody waited, for the intake's estimates."""
        num_prompt = sum(row.num_tokens for row in step.rows if not row.is_decode)
        self._served += PROMPT_WEIGHT * num_prompt + OUTPUT_WEIGHT * sum(map(len, drawn))
        self._served_in += self._last_run

    def _events_of(self, outcome: Outcome, now: float) -> list[tuple[Sequence, Event]]:
        sequence = outcome.sequence
        if not outcome.drawn:
            who = f"adapter {sequence.adapter_id}" if sequence.digest else "the base model"
            return [
                self._fail(sequence, RequestError("NAN_LOGITS", f"{who} gave no finite logits"))
            ]
        token_ids = tuple(sampled.token_id for sampled in outcome.drawn)
        logprobs = tuple(s.logprobs for s in outcome.drawn if s.logprobs is not None)
        events: list[tuple[Sequence, Event]] = [(sequence, Tokens(token_ids, logprobs))]
        if outcome.finish is not None:
            del self._live[sequence.request_id]
            stopped = token_ids[-1] in sequence.stop.stop_token_ids
            stop_token = token_ids[-1] if stopped else None
            finished = Finished(
                outcome.finish, stop_token, sequence.num_cached, sequence.timings(now)
            )
            events.append((sequence, finished))
        return events

    def _fail(self, sequence: Sequence, error: RequestError) -> tuple[Sequence, Event]:
        self._live.pop(sequence.request_id, None)
        if sequence.phase is not Phase.FINISHED:
            self._scheduler.abort(sequence)
        return sequence, error

    def _add(self, sequence: Sequence) -> None:
        self._live[sequence.request_id] = sequence
        self._scheduler.add(sequence)

    def _abort(self, request_id: str) -> None:
        sequence = self._live.pop(request_id, None)
        if sequence is not None:
            self._scheduler.abort(sequence)

    def _stop(self) -> None:
        self._is_stopping = True
        for request_id in list(self._live):
            self._abort(request_id)

    def _fail_waiting(self, version: str, error: RequestError) -> None:
        """Every request that waits for this adapter gets the reason."""
        self._send(
            [self._fail(sequence, error) for sequence in self._scheduler.waiting.needing(version)]
        )

    def _check(self, answer: Callable[[Exception | None], None]) -> None:
        try:
            self._scheduler.check_integrity()
            self._host.check_integrity()
        except AssertionError as error:
            answer(error)
        else:
            answer(None)

    def _state(self) -> EngineState:
        scheduler = self._scheduler
        return EngineState(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks=scheduler.arena.count(Use.KV),
            adapter_blocks=scheduler.arena.count(Use.ADAPTER),
            cached_blocks=scheduler.arena.count(Use.CACHED),
            free_blocks=scheduler.arena.num_free,
            resident_adapters=scheduler.pool.num_ready,
            host_adapters=len(self._host),
            prefix_queries=scheduler.kv.stats.num_queried,
            prefix_hits=scheduler.kv.stats.num_found,
        )

    def _send(self, events: Seq[tuple[Sequence, Event]]) -> None:
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events, self._served, self._served_in)
            self._served = self._served_in = 0.0

    def _deliver(self, events: Seq[tuple[Sequence, Event]], served: float, seconds: float) -> None:
        if seconds:
            self._intake.served(served, seconds)
        for sequence, event in events:
            stream = self._streams.get(sequence.request_id)
            # An aborted request's id may belong to another one by now.
            if stream is None or stream.sequence is not sequence:
                continue
            if isinstance(event, Tokens):
                self._intake.began(sequence)
            else:
                del self._streams[sequence.request_id]
                is_end = isinstance(event, Finished)
                self._intake.leave(sequence, len(sequence.output_token_ids) if is_end else None)
            stream.push(event)


def _settle(asked: "asyncio.Future[None]", error: Exception | None) -> None:
    if asked.done():  # nobody waits any more
        return
    if error is None:
        asked.set_result(None)
    else:
        asked.set_exception(error)
