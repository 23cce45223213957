"""Streams that put their work off as long as they may: what nobody waited for has not happened.

A device may run queued work at once, or late. Here it runs when an event after it is waited for,
and otherwise only as `chance` says, so that a missing wait shows as wrong bytes.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, repeat

import torch
from torch import Tensor

Work = Callable[[], object]


class LazyDevice:
    """The streams of one device, under one lock. `chance`: pieces of work that run by themselves
    at each call, on a stream in turn."""

    def __init__(self, chance: list[int] | None = None) -> None:
        self.lock = threading.RLock()
        self.streams: list[LazyStream] = []
        self._chance: Iterator[int] = cycle(chance) if chance else repeat(0)
        self._turn = 0

    def stream(self) -> "LazyStream":
        self.streams.append(LazyStream(self))
        return self.streams[-1]

    def stir(self) -> None:
        self._turn += 1
        stream = self.streams[self._turn % len(self.streams)]
        stream.finish(stream.num_done + next(self._chance))

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.finish(stream.num_given)


class LazyStream:
    """Work in order. Mutable: what waits, and how much was given and done."""

    def __init__(self, device: LazyDevice) -> None:
        self._device = device
        self._waiting: deque[Work] = deque()
        self.num_given = 0
        self.num_done = 0

    def give(self, work: Work) -> None:
        with self._device.lock:
            self._waiting.append(work)
            self.num_given += 1
            self._device.stir()

    def finish(self, count: int) -> None:
        """Run until `count` pieces of all that was ever given are done."""
        with self._device.lock:
            while self._waiting and self.num_done < count:
                self._waiting.popleft()()
                self.num_done += 1


@dataclass(frozen=True)
class LazyEvent:
    stream: LazyStream
    number: int

    def synchronize(self) -> None:
        self.stream.finish(self.number)


class LazyCopyStream:
    """`transfer.CopyStream`; `compute` is where the steps' work goes."""

    def __init__(self, stream: LazyStream, compute: LazyStream) -> None:
        self.stream = stream
        self.compute = compute
        self._pinned: list[Tensor] = []  # kept, so that nothing else comes to lie there

    def pinned(self, num_bytes: int) -> Tensor:
        self._pinned.append(torch.zeros(num_bytes, dtype=torch.uint8))
        return self._pinned[-1]

    def is_pinned(self, source: Tensor) -> bool:
        place = source.untyped_storage().data_ptr()
        return any(memory.untyped_storage().data_ptr() == place for memory in self._pinned)

    def after_steps(self) -> None:
        number = self.compute.num_given
        self.stream.give(lambda: self.compute.finish(number))

    def copy(self, destination: Tensor, source: Tensor) -> None:
        assert self.is_pinned(source), "a device reads pinned memory only"
        self.stream.give(lambda: destination.copy_(source))

    def record(self) -> LazyEvent:
        return LazyEvent(self.stream, self.stream.num_given)
