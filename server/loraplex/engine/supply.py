"""The supply of adapters: from disk to host memory, and on to the device, as the scheduler says.

    read    disk -> host, by the loader; for everybody who waits, the most wanted first
    copy    host -> device, by the runner on the loader's threads, into blocks the pool gave
    bind    the slot becomes this adapter, between two steps

Reads and copies run elsewhere; what they end with comes back through `post`, so that all state here
changes on the engine thread.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar

from loraplex.adapters.pool import Load
from loraplex.adapters.tiers import HostTier, Sized, Tier
from loraplex.engine.fitting import RETRY_SECONDS
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.step import Step
from loraplex.errors import RequestError

log = logging.getLogger(__name__)

MAX_READS = 4
"""Under way at a time; and so many may be held for those who wait even beyond the budget."""


class Packed(Sized, Protocol):
    """An adapter in the arena's form, as far as the engine looks."""

    @property
    def num_blocks(self) -> int: ...


P = TypeVar("P", bound=Packed)
P_contra = TypeVar("P_contra", bound=Packed, contravariant=True)


class Device(Protocol[P_contra]):
    """Takes adapters. A copy may run on any thread; slots are bound between steps."""

    def copy_adapter(self, packed: P_contra, blocks: Seq[int]) -> None: ...
    def bind_slot(self, slot: int, packed: P_contra, blocks: Seq[int]) -> None: ...
    def bind_blend(self, slot: int, members: Seq[tuple[int, float]]) -> None: ...


class Loader(Protocol[P]):
    """Brings adapters from disk, and runs copies, off the engine thread."""

    def read(self, digest: str) -> "Future[P]": ...
    def run(self, work: Callable[[], None]) -> "Future[None]": ...


class LoadObserver(Protocol):
    """Is told what came and went."""

    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None: ...
    def on_evictions(self, tier: Tier, count: int) -> None: ...


Answer = Callable[[Exception | None], None]


class Supply(Generic[P]):
    """See the module's docstring.

    Mutable: `_reading` and `_copying`, when each read and copy under way began; `_took`, the
    seconds of reads whose adapter was not copied yet; `_stale`, reads whose version was forgotten
    meanwhile; `_pinning`, who waits for a read to pin what it brings.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        device: Device[P],
        loader: Loader[P],
        host: HostTier[P],
        observer: LoadObserver,
        clock: Callable[[], float],
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[str, RequestError], None],
    ) -> None:
        """`post`: has something done on the engine thread. `fail`: ends all who wait for one."""
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._device = device
        self._loader = loader
        self._host = host
        self._observer = observer
        self._clock = clock
        self._post = post
        self._fail = fail
        self._reading: dict[str, float] = {}
        self._copying: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._stale: set[str] = set()
        self._pinning: dict[str, list[tuple[str, Answer]]] = {}  # owners, by version

    def size_of(self, version: str) -> int | None:
        """Blocks of a version that can be copied to the device at once."""
        packed = self._host.peek(version)
        return None if packed is None else packed.num_blocks

    def carry_out(self, step: Step) -> None:
        """Start what the step asks for."""
        for load in step.loads:
            self._copy(load)
        if step.wanted:
            self._read_ahead(step)
        if self._host.is_over:
            self._trim()
        if step.num_evicted:
            self._observer.on_evictions(Tier.DEVICE, step.num_evicted)

    def has_begun_since(self, time: float) -> bool:
        """Whether a read or a copy is under way that began then or later."""
        return any(began >= time for began in (*self._reading.values(), *self._copying.values()))

    def pin(self, version: str, owner: str, answer: Answer) -> None:
        """Answers once it is known to fit: after it was read, if it has to be."""
        resident = self._pool.get(version)
        num_blocks = len(resident.blocks) if resident else self.size_of(version)
        if num_blocks is not None:
            answer(self._pin(version, owner, num_blocks))
            return
        self._pinning.setdefault(version, []).append((owner, answer))
        if version not in self._reading:
            self._read(version)

    def unpin(self, version: str, owner: str) -> None:
        self._pool.unpin(version, owner)
        pinning = self._pinning.get(version, [])
        for asked in [asked for asked in pinning if asked[0] == owner]:
            pinning.remove(asked)
            asked[1](None)

    def forget(self, version: str) -> None:
        self._pool.forget(version)
        self._drop(version)
        if version in self._reading:
            self._stale.add(version)

    def _read_ahead(self, step: Step) -> None:
        """The urgent ones whatever they take; of the others only a few beyond the budget."""
        held = [version for version in self._scheduler.awaited if version in self._host]
        num_held = 0 if self._host.has_room_beside(held) else len(held)
        for index, version in enumerate(step.wanted):
            num_ahead = 0 if index < step.num_urgent else num_held
            if len(self._reading) + num_ahead >= MAX_READS:
                return
            if version not in self._reading:
                self._read(version)

    def _read(self, version: str) -> None:
        self._reading[version] = self._clock()
        future = self._loader.read(version)
        future.add_done_callback(lambda f: self._post(partial(self._on_read, version, f)))

    def _on_read(self, version: str, future: "Future[P]") -> None:
        seconds = self._clock() - self._reading.pop(version)
        pinning = self._pinning.pop(version, [])
        is_stale = version in self._stale
        self._stale.discard(version)
        is_needed = bool(pinning) or self._scheduler.is_awaited(version)
        error = future.exception()
        if error is not None and is_stale and is_needed:
            # Of files that are gone; what is asked for was published since.
            self._pinning[version] = pinning
            self._read(version)
        elif error is not None:
            reason = self._failed(version, seconds, error)
            for _, answer in pinning:
                answer(reason)
        elif is_needed or not is_stale:
            packed = future.result()
            self._host.put(version, packed)
            self._took[version] = seconds
            for owner, answer in pinning:
                answer(self._pin(version, owner, packed.num_blocks))

    def _pin(self, version: str, owner: str, num_blocks: int) -> RequestError | None:
        if self._pool.pin(version, owner, num_blocks):
            return None
        pinned, limit = self._pool.pinned_room(), self._pool.pin_limit
        if pinned.slots == limit.slots:
            option, what = "--max-slots", f"slots (--max-slots): {limit.slots} may be pinned"
        else:
            needed = f"{pinned.blocks} and {num_blocks}, of {limit.blocks}"
            option, what = "--memory", f"blocks (--memory): {needed}"
        return RequestError(
            "PINS_EXCEED_MEMORY",
            f"the pinned adapters would take more than half of the {what}",
            retry_after=RETRY_SECONDS,
            metadata={"option": option},
        )

    def _copy(self, load: Load) -> None:
        packed = self._host.get(load.digest)
        assert packed is not None, "room was given to an adapter that was not read"
        self._copying[load.digest] = self._clock()
        future = self._loader.run(partial(self._device.copy_adapter, packed, load.blocks))
        done = partial(self._on_copied, load, packed)
        future.add_done_callback(lambda f: self._post(partial(done, f)))

    def _on_copied(self, load: Load, packed: P, future: "Future[None]") -> None:
        now = self._clock()
        seconds = self._took.pop(load.digest, 0.0) + now - self._copying.pop(load.digest)
        error = future.exception()
        if error is not None:
            self._pool.drop(load.digest)
            self._failed(load.digest, seconds, error)
            return
        self._device.bind_slot(load.slot, packed, load.blocks)
        self._scheduler.loaded(load.digest, now)
        self._observer.on_load(load.digest, seconds, None)

    def _failed(self, version: str, seconds: float, error: BaseException) -> RequestError:
        """Those who wait get the reason, and nobody tries again for a pin alone."""
        if not isinstance(error, RequestError):
            log.error("loading adapter %s failed", version[:12], exc_info=error)
            error = RequestError("INTERNAL", "internal error")
        if self._pool.is_pinned(version):
            log.warning("adapter %s is pinned, but is not here: %s", version[:12], error.message)
            self._pool.give_up(version)
        self._drop(version)
        self._observer.on_load(version, seconds, error)
        self._fail(version, error)
        return error

    def _trim(self) -> None:
        gone = self._host.trim(self._scheduler.is_awaited)
        for version in gone:
            self._took.pop(version, None)
        if gone:
            self._observer.on_evictions(Tier.HOST, len(gone))

    def _drop(self, version: str) -> None:
        self._host.drop(version)
        self._took.pop(version, None)
