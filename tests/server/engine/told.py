"""Drafts as a test wants them."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Scheduled

Guess = Callable[[Sequence], Seq[int]]


class Told:
    """A `Speculator` that drafts what a function of the sequence says. Mutable: the counts."""

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self.num_drafts = 0
        self.num_confirmed = 0

    def extend(
        self, rows: Seq[Scheduled], budget: int, num_running: int, kv: KVMemory
    ) -> list[Scheduled]:
        extended = []
        for row in rows:
            left = row.sequence.stop.max_tokens - len(row.sequence.output_token_ids) - 1
            drafts = tuple(self._guess(row.sequence)[: max(0, min(left, budget))])
            end = row.start + row.num_tokens + len(drafts)
            decodes = row.samples and row.num_tokens == 1
            if decodes and drafts and kv.stretch(row.sequence, end, num_running):
                row = replace(row, num_tokens=end - row.start, drafts=drafts)
                budget -= len(drafts)
            extended.append(row)
        return extended

    def learn(self, row: Scheduled, num_confirmed: int) -> None:
        assert 0 <= num_confirmed <= len(row.drafts)
        self.num_drafts += len(row.drafts)
        self.num_confirmed += num_confirmed

    def timed(self, rows: Seq[Scheduled], seconds: float) -> None: ...
