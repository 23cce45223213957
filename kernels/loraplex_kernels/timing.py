"""How long the device takes, and how quick it can be."""

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 7
ENOUGH_SECONDS = 0.1
COPY_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
HIDDEN_SECONDS = 1e-3
"""Of device work ahead of each timed call: longer than the host takes to launch the call."""


def time_on_cpu(call: Callable[[], None]) -> float:
    """The median of several calls, or of fewer where they are slow; after one to warm up."""
    call()
    seconds: list[float] = []
    while len(seconds) < REPEATS and (len(seconds) < 3 or sum(seconds) < ENOUGH_SECONDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class CudaTimer:
    """Device time alone: the host's launches hide behind a flush of the caches.

    The flush is also what makes a call read its weights from memory, as in a step that walks
    through all layers.
    """

    def __init__(self, device: torch.device, copy_bytes_per_second: float) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(4 * cache_bytes, 64 << 20), dtype=torch.int8, device=device)
        wanted = HIDDEN_SECONDS * copy_bytes_per_second
        self._num_flushes = max(1, round(wanted / self._flushed.nbytes))

    def __call__(self, call: Callable[[], None]) -> float:
        call()
        return statistics.median(self._once(call) for _ in range(REPEATS))

    def _once(self, call: Callable[[], None]) -> float:
        before, after = (torch.Event(self._flushed.device, enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(self._num_flushes):
            self._flushed.zero_()
        before.record()
        call()
        after.record()
        after.synchronize()
        milliseconds: float = before.elapsed_time(after)
        return milliseconds / 1e3


def timer_for(device: torch.device) -> Callable[[Callable[[], None]], float]:
    if device.type == "cuda":
        return CudaTimer(device, copy_bytes_per_second(device))
    return time_on_cpu


def copy_bytes_per_second(device: torch.device) -> float:
    """Read and written, in a copy far larger than the caches; the quickest of several."""
    size = COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / min(_seconds_of_copy(source, target) for _ in range(REPEATS))


def _seconds_of_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    """On CUDA the launch is counted too, a few hundredths of the whole."""
    start = time.perf_counter()
    target.copy_(source)
    if source.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
