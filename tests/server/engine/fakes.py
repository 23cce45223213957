"""A device and a disk for the engine's tests, which say how far each may go."""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Drawn, Sampled, Scheduled

SICK = 666  # a prompt of this token gives logits that are not finite
BROKEN = 667  # and this one fails the whole step


@dataclass(frozen=True)
class Packed:
    digest: str
    num_blocks: int = 2
    num_bytes: int = 100


def token_at(prompt: Seq[int], position: int) -> int:
    return (sum(prompt) * 31 + position * 7) % 1000


def contents_of(sequence: Sequence) -> str | None:
    """What its slot must hold."""
    if sequence.blend:
        return " + ".join(f"{part.weight} {part.digest}" for part in sequence.blend)
    return sequence.digest


class Gate:
    """Open at first; then lets so many through as it is told."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._permits: int | None = None
        self.is_waited_at = False

    def hold(self) -> None:
        with self._changed:
            self._permits = 0

    def allow(self, count: int | None = None) -> None:
        """So many more; without a number the gate is open again."""
        with self._changed:
            self._permits = (
                None if count is None or self._permits is None else self._permits + count
            )
            self._changed.notify_all()

    def enter(self) -> None:
        with self._changed:
            self.is_waited_at = True
            assert self._changed.wait_for(lambda: self._permits != 0, timeout=20), "held too long"
            self.is_waited_at = False
            if self._permits is not None:
                self._permits -= 1


class FakeRunner:
    """A step pretends to take `seconds`."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.seconds = 0.0
        self.pretended = 0.0
        self.copied: list[tuple[str, tuple[int, ...]]] = []
        self.bound: dict[int, str] = {}  # a slot's digest, or what a blend is made of

    def run(self, rows: Seq[Scheduled]) -> list[Drawn]:
        self.gate.enter()
        self.pretended += self.seconds
        for row in rows:
            slot = row.sequence.slot
            assert (None if slot is None else self.bound[slot]) == contents_of(row.sequence)
        if any(BROKEN in row.sequence.prompt_token_ids for row in rows):
            raise ValueError("the device is on fire")
        return [self.draw(row.sequence) for row in rows if row.samples]

    def draw(self, sequence: Sequence) -> Drawn:
        if SICK in sequence.prompt_token_ids:
            return ()
        return (Sampled(token_at(sequence.prompt_token_ids, len(sequence.output_token_ids))),)

    def copy_adapter(self, packed: Packed, blocks: Seq[int]) -> None:
        if packed.digest == "uncopyable":
            raise OSError("the disk went away")
        self.copied.append((packed.digest, tuple(blocks)))

    def bind_slot(self, slot: int, packed: Packed, blocks: Seq[int]) -> None:
        assert (packed.digest, tuple(blocks)) in self.copied
        self.bound[slot] = packed.digest

    def bind_blend(self, slot: int, members: Seq[tuple[int, float]]) -> None:
        self.bound[slot] = " + ".join(
            f"{weight} {self.bound[member]}" for member, weight in members
        )


class FakeLoader:
    """Reads end when the test says so; copies run at once."""

    def __init__(self) -> None:
        self.reads: dict[str, Future[Packed]] = {}
        self.instant = True

    def read(self, digest: str) -> Future[Packed]:
        future: Future[Packed] = Future()
        self.reads[digest] = future
        if self.instant:
            future.set_result(Packed(digest))
        return future

    def run(self, work: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        try:
            work()
            future.set_result(None)
        except OSError as error:
            future.set_exception(error)
        return future
