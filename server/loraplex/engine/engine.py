"""The engine: one thread that decides, runs and hands out, a step at a time.

    submit, abort      from the event loop, into the inbox
    _step              schedule -> run -> update, on the engine thread
    _deliver           back on the event loop, into each request's stream

All state of scheduler, arena and pool changes on the engine thread; `_streams` on the event loop.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from loraplex.adapters.pool import Load
from loraplex.engine.arena import Use
from loraplex.engine.scheduler import Outcome, Sampled, Scheduled, Scheduler, Step
from loraplex.engine.sequence import Finished, Phase, Sequence, Tokens
from loraplex.engine.stream import Event, TokenStream
from loraplex.errors import RequestError

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 8
"""So many steps in a row that raise are no longer the requests' fault: the engine ends."""


class Packed(Protocol):
    """An adapter in the arena's form, as far as the engine looks."""

    @property
    def num_blocks(self) -> int: ...


P = TypeVar("P", bound=Packed)
P_contra = TypeVar("P_contra", bound=Packed, contravariant=True)


class Runner(Protocol[P_contra]):
    """The device."""

    def run(self, rows: Seq[Scheduled]) -> list[Sampled]: ...
    def copy_adapter(self, packed: P_contra, blocks: Seq[int]) -> None: ...
    def bind_slot(self, slot: int, packed: P_contra, blocks: Seq[int]) -> None: ...


class Loader(Protocol[P]):
    """Brings adapters from disk, and runs copies, off the engine thread."""

    def read(self, digest: str) -> "Future[P]": ...
    def run(self, work: Callable[[], None]) -> "Future[None]": ...


@dataclass(frozen=True, slots=True)
class EngineState:
    """How full the engine is."""

    num_running: int
    num_waiting: int
    kv_blocks: int
    adapter_blocks: int
    free_blocks: int
    resident_adapters: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one forward pass did: rows are its sequences, parallel in the tuples."""

    number: int
    started_at: float  # seconds since the epoch
    duration: float  # seconds, scheduling and sampling included
    request_ids: tuple[str, ...]
    digests: tuple[str | None, ...]
    num_tokens: tuple[int, ...]  # 1: a decode row
    num_sampled: int
    num_preempted: int


class Observer(Protocol):
    """Is told of every step, on the engine thread; must be quick."""

    def on_step(self, record: StepRecord) -> None: ...
    def on_state(self, state: EngineState) -> None: ...
    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the queue and of one stream."""

    max_live: int  # requests running and waiting
    stream_limit: int = 4096  # tokens a client may leave unread


@dataclass(slots=True)
class _Fetch(Generic[P]):
    """An adapter between disk and device; `packed` once it was read."""

    started_at: float
    packed: P | None = None


class Engine(Generic[P]):
    """See the module's docstring. Built on the event loop that will use it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[P],
        loader: Loader[P],
        observer: Observer,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._loader = loader
        self._observer = observer
        self._config = config
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, TokenStream] = {}  # the event loop's
        self._stopped = False
        self.crashed = asyncio.Event()  # set when the thread ended by itself: nothing runs any more
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._live: dict[str, Sequence] = {}  # the engine thread's, as all below
        self._fetches: dict[str, _Fetch[P]] = {}
        self._num_steps = 0
        self._num_failed = 0  # in a row
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, sequence: Sequence) -> TokenStream:
        """Queue a request; its events come from the stream. Raises RequestError when refused."""
        if self._stopped:
            raise RequestError("DRAINING", "the server is shutting down", retry_after=5.0)
        if sequence.request_id in self._streams:
            raise RequestError(
                "REQUEST_ID_IN_USE", f"request {sequence.request_id} is still running"
            )
        if len(self._streams) >= self._config.max_live:
            raise RequestError("QUEUE_FULL", "too many requests are waiting", retry_after=1.0)
        sequence.submitted_at = self._clock()
        stream = TokenStream(sequence, self._config.stream_limit, self._clock, self.abort)
        self._streams[sequence.request_id] = stream
        self._inbox.put(partial(self._add, sequence))
        return stream

    def abort(self, request_id: str) -> None:
        """Forget a request; what it held is free before the next step. Idempotent."""
        if self._streams.pop(request_id, None) is not None:
            self._inbox.put(partial(self._abort, request_id))

    def residency(self, digest: str) -> bool:
        """Whether a version lies in device memory. A glimpse: it may change at the next step."""
        resident = self._scheduler.pool.get(digest)
        return resident is not None and resident.ready

    @property
    def num_live(self) -> int:
        return len(self._streams)

    async def stop(self) -> None:
        """End the thread; requests still live get DRAINING."""
        self._end_streams(RequestError("DRAINING", "the server was shut down"))
        self._inbox.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def _end_streams(self, error: RequestError) -> None:
        self._stopped = True
        for stream in self._streams.values():
            stream.push(error)
        self._streams.clear()

    def _run(self) -> None:
        busy = False
        try:
            while not self._stopping:
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
        """Schedule, run, update. False when there was nothing to run."""
        started = self._clock()
        self._forget_unwanted()
        sizes = {d: f.packed.num_blocks for d, f in self._fetches.items() if f.packed is not None}
        step = self._scheduler.schedule(sizes, started)
        for digest in step.wanted:
            self._fetch(digest)
        for load in step.loads:
            self._copy(load)
        events: list[tuple[Sequence, Event]] = [self._fail(s, error) for s, error in step.failed]
        if step.rows:
            events += self._run_step(step, started)
        if events:
            self._loop.call_soon_threadsafe(self._deliver, events)
        return bool(step.rows)

    def _run_step(self, step: Step, started: float) -> list[tuple[Sequence, Event]]:
        wall = time.time()
        try:
            sampled = self._runner.run(step.rows)
        except Exception:
            self._num_failed += 1
            if self._num_failed == MAX_FAILED_STEPS:
                raise
            log.exception("a step failed")
            error = RequestError("INTERNAL", "internal error")
            return [self._fail(row.sequence, error) for row in step.rows]
        self._num_failed = 0
        now = self._clock()
        outcomes = self._scheduler.update(step, sampled, now)
        self._num_steps += 1
        self._observer.on_step(
            StepRecord(
                number=self._num_steps,
                started_at=wall,
                duration=now - started,
                request_ids=tuple(row.sequence.request_id for row in step.rows),
                digests=tuple(row.sequence.digest for row in step.rows),
                num_tokens=tuple(row.num_tokens for row in step.rows),
                num_sampled=len(sampled),
                num_preempted=step.num_preempted,
            )
        )
        self._observer.on_state(self._state())
        return [event for outcome in outcomes for event in self._events_of(outcome, now)]

    def _events_of(self, outcome: Outcome, now: float) -> list[tuple[Sequence, Event]]:
        sequence = outcome.sequence
        if outcome.token_id is None:
            who = f"adapter {sequence.adapter_id}" if sequence.digest else "the base model"
            return [
                self._fail(sequence, RequestError("NAN_LOGITS", f"{who} gave no finite logits"))
            ]
        logprobs = () if outcome.logprobs is None else (outcome.logprobs,)
        events: list[tuple[Sequence, Event]] = [(sequence, Tokens((outcome.token_id,), logprobs))]
        if outcome.finish is not None:
            del self._live[sequence.request_id]
            stopped = outcome.token_id in sequence.stop.stop_token_ids
            stop_token = outcome.token_id if stopped else None
            finished = Finished(outcome.finish, stop_token, 0, sequence.timings(now))
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
        self._stopping = True
        for request_id in list(self._live):
            self._abort(request_id)

    def _fetch(self, digest: str) -> None:
        if digest not in self._fetches:
            self._fetches[digest] = _Fetch(self._clock())
            future = self._loader.read(digest)
            future.add_done_callback(lambda f: self._inbox.put(partial(self._on_read, digest, f)))

    def _forget_unwanted(self) -> None:
        """Let go of adapters that were read for requests which are gone."""
        if not self._fetches:
            return
        wanted = {sequence.digest for sequence in self._scheduler.waiting}
        for digest, fetch in list(self._fetches.items()):
            is_copied = self._scheduler.pool.get(digest) is not None
            if fetch.packed is not None and digest not in wanted and not is_copied:
                del self._fetches[digest]

    def _on_read(self, digest: str, future: "Future[P]") -> None:
        error = future.exception()
        if error is None:
            self._fetches[digest].packed = future.result()
        else:
            self._load_failed(digest, error)

    def _copy(self, load: Load) -> None:
        packed = self._fetches[load.digest].packed
        assert packed is not None, "room was given to an adapter that was not read"
        future = self._loader.run(partial(self._runner.copy_adapter, packed, load.blocks))
        done = partial(self._on_copied, load, packed)
        future.add_done_callback(lambda f: self._inbox.put(partial(done, f)))

    def _on_copied(self, load: Load, packed: P, future: "Future[None]") -> None:
        error = future.exception()
        if error is not None:
            self._scheduler.pool.drop(load.digest)
            self._load_failed(load.digest, error)
            return
        self._runner.bind_slot(load.slot, packed, load.blocks)
        self._scheduler.pool.loaded(load.digest)
        fetch = self._fetches.pop(load.digest)
        self._observer.on_load(load.digest, self._clock() - fetch.started_at, None)

    def _load_failed(self, digest: str, error: BaseException) -> None:
        """Every request that waits for this adapter gets the reason."""
        fetch = self._fetches.pop(digest)
        if not isinstance(error, RequestError):
            log.error("loading adapter %s failed", digest[:12], exc_info=error)
            error = RequestError("INTERNAL", "internal error")
        self._observer.on_load(digest, self._clock() - fetch.started_at, error)
        waiting = [s for s in self._scheduler.waiting if s.digest == digest]
        events = [self._fail(sequence, error) for sequence in waiting]
        self._loop.call_soon_threadsafe(self._deliver, events)

    def _state(self) -> EngineState:
        scheduler = self._scheduler
        return EngineState(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_blocks=scheduler.arena.count(Use.KV),
            adapter_blocks=scheduler.arena.count(Use.ADAPTER),
            free_blocks=scheduler.arena.num_free,
            resident_adapters=scheduler.pool.num_ready,
        )

    def _deliver(self, events: Seq[tuple[Sequence, Event]]) -> None:
        for sequence, event in events:
            stream = self._streams.get(sequence.request_id)
            # An aborted request's id may belong to another one by now.
            if stream is not None and stream.sequence is sequence:
                stream.push(event)
                if not isinstance(event, Tokens):
                    self._streams.pop(sequence.request_id, None)
