"""What the engine tells of its steps, as metrics and as the step-by-step record."""

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from loraplex.adapters.tiers import Tier
from loraplex.engine.engine import EngineState, StepRecord
from loraplex.errors import RequestError
from loraplex.metrics import Metrics

log = logging.getLogger(__name__)


class StepLog:
    """One JSON line a forward pass: who shared it, with which adapter versions, how many tokens.

    A disk that fails ends the record, never the engine that writes it.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO | None = path.open("w", encoding="utf-8", buffering=1)

    def write(self, record: StepRecord) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            log.warning("the step log ends here: %s", error)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


class EngineObserver:
    """Feeds metrics, and the step log where one was asked for."""

    def __init__(self, metrics: Metrics, step_log: StepLog | None) -> None:
        self._metrics = metrics
        self._step_log = step_log

    def on_step(self, record: StepRecord) -> None:
        distinct = {digest for digest in record.digests if digest is not None}
        self._metrics.observe_step(record.duration, len(record.digests), len(distinct))
        self._metrics.preempted(record.num_preempted)
        self._metrics.drafted(sum(record.num_drafts), record.num_confirmed)
        if self._step_log is not None:
            self._step_log.write(record)

    def on_state(self, state: EngineState) -> None:
        self._metrics.set_load(state.num_running, state.num_waiting)
        self._metrics.set_memory(
            state.kv_blocks, state.cached_blocks, state.adapter_blocks, state.free_blocks
        )
        self._metrics.set_prefix_cache(state.prefix_queries, state.prefix_hits)
        self._metrics.set_adapters_resident(state.resident_adapters, state.host_adapters)

    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None:
        self._metrics.adapter_load("ok" if error is None else error.reason.name, seconds)

    def on_evictions(self, tier: Tier, count: int) -> None:
        self._metrics.adapters_evicted(tier.value, count)
