"""From host memory to the device, beside the steps that run there.

On CUDA an adapter's blocks go over on a stream of their own: straight from where they lie if that
is pinned, as it is within the host tier's budget, else through a few pinned ones.
Three orders hold, and nothing else keeps copies and steps apart:

    refill  a pinned block is written again only after its last copy has left it
    begin   a copy begins after all steps that were queued before it: they may still use what its
            destination held (a step that only prefills, or that failed, ends without waiting)
    end     `copy` comes back, or raises, only after all it queued has landed; its caller keeps the
            sources as they are until then

At the end the loader's thread waits and not the compute stream: an adapter is bound once its copy
came back, so that no step can read it sooner, and no step ever stands behind a copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

NUM_STAGING = 4
"""Pinned blocks: two for each of the loader's threads, one to fill while the other leaves."""


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Wait until everything before it is done; other threads run on."""


class CopyStream(Protocol):
    """Copies to the device, done in the order they were queued. Any thread may queue them."""

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] in host memory that `copy` can read from."""

    def is_pinned(self, source: Tensor) -> bool:
        """Whether `copy` can read from it as it lies."""

    def after_steps(self) -> None:
        """What is queued next begins after all that the compute stream holds by now."""

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Queue a copy; the source must stay as it is until an event recorded later."""

    def record(self) -> Event: ...


class Copier(Protocol):
    """Brings blocks that lie in host memory to their places on the device."""

    def copy(self, sources: Iterable[Tensor], destinations: Iterable[Tensor]) -> None: ...


def copier_for(device: torch.device, block_bytes: int) -> Copier:
    if device.type != "cuda":
        return PlainCopier()
    compute = torch.cuda.default_stream(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return BlockCopier(CudaCopyStream(stream, compute), block_bytes)


class PlainCopier:
    """Where the device's memory is the host's."""

    def copy(self, sources: Iterable[Tensor], destinations: Iterable[Tensor]) -> None:
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)


@dataclass(slots=True)
class _Staging:
    """A pinned block; `left` is the event after which it may be written again."""

    memory: Tensor  # uint8 [block_bytes]
    left: Event | None = None


class BlockCopier:
    """Through pinned memory, on a stream; see the module's docstring. For any number of threads.

    Mutable: `_staging`, the pinned blocks that no thread holds, the one used longest ago first.
    """

    def __init__(
        self, stream: CopyStream, block_bytes: int, num_staging: int = NUM_STAGING
    ) -> None:
        self._stream = stream
        self._staging: SimpleQueue[_Staging] = SimpleQueue()
        for memory in stream.pinned(num_staging * block_bytes).view(num_staging, block_bytes):
            self._staging.put(_Staging(memory))

    def copy(self, sources: Iterable[Tensor], destinations: Iterable[Tensor]) -> None:
        """uint8 [block_bytes] each; may take as long as the disk does."""
        self._stream.after_steps()
        try:
            for source, destination in zip(sources, destinations, strict=True):
                self._send(source, destination)
        finally:  # after an error too: the destinations are about to be given to somebody else
            self._stream.record().synchronize()

    def _send(self, source: Tensor, destination: Tensor) -> None:
        if self._stream.is_pinned(source):
            self._stream.copy(destination, source)
        else:
            self._stage(source, destination)

    def _stage(self, source: Tensor, destination: Tensor) -> None:
        staging = self._staging.get()
        try:
            if staging.left is not None:
                staging.left.synchronize()
            staging.memory.copy_(source)  # here pages come from the disk; other threads run on
            self._stream.copy(destination, staging.memory)
            staging.left = self._stream.record()
        finally:
            self._staging.put(staging)


class CudaCopyStream:
    """`CopyStream` on a CUDA stream; the two may be the same."""

    def __init__(self, stream: torch.cuda.Stream, compute: torch.cuda.Stream) -> None:
        self._stream = stream
        self._compute = compute

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, source: Tensor) -> bool:
        return source.is_pinned()

    def after_steps(self) -> None:
        self._stream.wait_stream(self._compute)

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event
