"""Drafts for decoding sequences from their own text, where they pay. Pure: no device, no clock.

Prompt lookup (Saxena 2023): what followed the latest longest match of a sequence's last tokens is
guessed to follow again, and the next pass verifies it (sampler.py), so that one pass may draw
several tokens where a text quotes, edits or repeats what it has seen.

Drafts take only what a step leaves over, of its budget of tokens and of the memory for KV. Which of
them pay is a sum: a step takes as long as f + its rows, where f rows take as long as reading the
weights for all of them, and half of a row's cost is that of its tile, begun or not. The likeliest
drafts are added as long as the tokens expected of the step grow by WORTH times what its time does.
So one sequence alone may guess boldly; with many beside it only what is nearly sure is guessed. f
is learnt from the times of steps. How likely a draft is, each sequence learns from its latest ones,
apart for short and long matches; while they do not pay that drifts back, so that they are tried now
and then.
"""

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol
from weakref import WeakKeyDictionary

from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import Sequence
from loraplex.engine.step import Scheduled

FREE_ROWS = 16.0
"""Rows that take as long as reading the weights for them, until the steps' times tell."""

WORTH = 2.0
"""What drafts have to bring for what they cost: who has none beside them only waits for them."""

TILE_ROWS = 16
"""Rows that a matrix unit takes at a time."""

STEP_MEMORY = 0.995
"""What is left of older steps' times at each step."""

SPREAD = 1.0
"""Variance of the steps' numbers of rows at which their times count as much as FREE_ROWS."""

OUTLIER = 1.5
"""A step that takes more than so many times what was to be expected counts as this."""

MAX_DRAFT_ROWS = 64
"""Drafts of one step, over all its sequences, unless told otherwise."""

MAX_DRAFTS = 8
"""Drafts of one sequence in one step, unless told otherwise."""

LONGEST_MATCH = 8
"""Tokens; no longer one is looked for."""

MAX_PLACES = 32
"""So many of the latest places where the last token stood are looked at."""

PRIORS = (0.35, 0.6, 0.8)
"""How often the next token of a draft is confirmed, by the match's length: 1, 2, 3 or more."""

PRIOR_WEIGHT = 2.0
"""In drafts: the experience that a prior counts as at first."""

MEMORY = 0.8
"""What is left of older experience when a row's drafts were verified."""

SLOW_MEMORY = 0.99
"""And when some were at hand but did not pay; what is lost of it comes from the prior again."""


class Speculator(Protocol):
    """Adds drafts to steps."""

    def extend(
        self, rows: Seq[Scheduled], budget: int, num_running: int, kv: KVMemory
    ) -> list[Scheduled]:
        """The rows, those that decode with drafts where it pays: `budget` more tokens at most."""

    def learn(self, row: Scheduled, num_confirmed: int) -> None:
        """So many of the row's drafts were right."""

    def timed(self, rows: Seq[Scheduled], seconds: float) -> None:
        """A step of these rows took so long."""


class Text:
    """A sequence's tokens, and where else each of them stands. Mutable: grows at its end."""

    def __init__(self) -> None:
        self._tokens = array("q")
        self._latest: dict[int, int] = {}  # place of each token
        self._before = array("q")  # the place of the same token before this one; -1: none

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Seq[int]) -> None:
        for place, token in enumerate(tokens, start=len(self._tokens)):
            self._before.append(self._latest.get(token, -1))
            self._latest[token] = place
        self._tokens.extend(tokens)

    def guess(self, limit: int) -> tuple[int, tuple[int, ...]]:
        """What may come next, and how many of the last tokens stood before it; 0: no guess.

        A match that overlaps its own end goes on in circles, as the text may.
        """
        length, place = self._match()
        if length == 0:
            return 0, ()
        found = self._tokens[place + 1 : place + 1 + limit].tolist()
        period = len(found)
        return length, tuple(found[at % period] for at in range(limit))

    def _match(self) -> tuple[int, int]:
        """The longest one's length, and the place of its last token; the latest of equal ones."""
        tokens, last = self._tokens, len(self._tokens) - 1
        best, best_place, place = 0, -1, self._before[last] if tokens else -1
        for _ in range(MAX_PLACES):
            if place < 0:
                break
            length = 1
            while (
                length < LONGEST_MATCH
                and length <= place
                and tokens[place - length] == tokens[last - length]
            ):
                length += 1
            if length > best:
                best, best_place = length, place
                if length == LONGEST_MATCH:
                    break
            place = self._before[place]
        return best, best_place


class RowCost:
    """How many rows take as long as what a step takes whatever its rows.

    A line through the latest steps' (rows, seconds), by least squares with exponential forgetting;
    its slope is drawn to that of FREE_ROWS as far as steps differ too little in their rows to tell.
    Mutable: the weighted means, variance and covariance.
    """

    def __init__(self, free_rows: float = FREE_ROWS) -> None:
        self._prior = free_rows
        self._weight = self._rows = self._seconds = self._variance = self._covariance = 0.0

    def learn(self, num_rows: float, seconds: float) -> None:
        if self._weight > 1:
            seconds = min(seconds, OUTLIER * self._slope * (self.free_rows + num_rows))
        self._weight = STEP_MEMORY * self._weight + 1
        part = 1 / self._weight
        rows, more = num_rows - self._rows, seconds - self._seconds
        self._rows += part * rows
        self._seconds += part * more
        self._variance = (1 - part) * (self._variance + part * rows * rows)
        self._covariance = (1 - part) * (self._covariance + part * rows * more)

    @property
    def free_rows(self) -> float:
        """At least one, and finite: a row never comes for nothing."""
        if not self._seconds:
            return self._prior
        return max(1.0, self._seconds / self._slope - self._rows)

    @property
    def _slope(self) -> float:
        """Seconds a row."""
        usual = self._seconds / (self._prior + self._rows)
        slope = (self._covariance + SPREAD * usual) / (self._variance + SPREAD)
        return max(slope, usual / 8)


@dataclass(slots=True)
class Experience:
    """How drafts after matches of one kind fared. Mutable: all but the prior."""

    prior: float
    probability: float  # that the next token of a draft is right when those before it were
    weight: float = PRIOR_WEIGHT  # of that, in drafts; those after a wrong one do not count

    def learn(self, num_drafts: int, num_right: int) -> None:
        older, num_tried = MEMORY * self.weight, min(num_drafts, num_right + 1)
        self.weight = older + num_tried
        self.probability = (self.probability * older + num_right) / self.weight

    def forget(self) -> None:
        self.weight *= SLOW_MEMORY
        self.probability += (1 - SLOW_MEMORY) * (self.prior - self.probability)


@dataclass(slots=True)
class _Notes:
    """Of one sequence. Mutable: all of it."""

    text: Text = field(default_factory=Text)
    experiences: list[Experience] = field(
        default_factory=lambda: [Experience(prior, prior) for prior in PRIORS]
    )
    latest: int = 0  # which of them the latest guess belongs to


@dataclass(slots=True)
class _Offer:
    """A row's guess in a step that is being decided."""

    row: int  # index
    tokens: tuple[int, ...]
    experience: Experience
    num_taken: int = 0


class PromptLookup:
    """`Speculator` by each sequence's own text.

    Mutable: `_notes` of each as long as it lives, and `_cost` as it learns.
    """

    def __init__(
        self,
        max_drafts: int = MAX_DRAFTS,
        max_rows: int = MAX_DRAFT_ROWS,
        free_rows: float = FREE_ROWS,
    ) -> None:
        """At most `max_drafts` for a sequence in one step, and `max_rows` for all of them.

        `free_rows`: as long as no step was timed.
        """
        self._max_drafts = max_drafts
        self._max_rows = max_rows
        self._cost = RowCost(free_rows)
        self._notes: WeakKeyDictionary[Sequence, _Notes] = WeakKeyDictionary()

    def extend(
        self, rows: Seq[Scheduled], budget: int, num_running: int, kv: KVMemory
    ) -> list[Scheduled]:
        extended = list(rows)
        budget = min(budget, self._max_rows)
        if budget <= 0:
            return extended
        offers = [offer for index, row in enumerate(rows) if (offer := self._offer(index, row))]
        self._choose(offers, rows, budget)
        for offer in offers:
            row, drafts = rows[offer.row], offer.tokens[: offer.num_taken]
            num_tokens = row.num_tokens + len(drafts)
            if not drafts:
                offer.experience.forget()
            elif kv.stretch(row.sequence, row.start + num_tokens, num_running):
                extended[offer.row] = replace(row, num_tokens=num_tokens, drafts=drafts)
        return extended

    def learn(self, row: Scheduled, num_confirmed: int) -> None:
        notes = self._notes[row.sequence]
        notes.experiences[notes.latest].learn(len(row.drafts), num_confirmed)

    def timed(self, rows: Seq[Scheduled], seconds: float) -> None:
        if all(row.is_decode for row in rows):  # prompts cost otherwise
            self._cost.learn(_in_tiles(sum(row.num_tokens for row in rows)), seconds)

    def __len__(self) -> int:
        """Sequences that it has notes of."""
        return len(self._notes)

    def _offer(self, index: int, row: Scheduled) -> _Offer | None:
        """None: it does not decode, or there is nothing to guess."""
        sequence = row.sequence
        if not row.samples or row.num_tokens != 1:
            return None
        # Beside the drafts one more token is drawn.
        limit = sequence.stop.max_tokens - len(sequence.output_token_ids) - 1
        if limit <= 0:
            return None
        notes = self._notes.get(sequence)
        if notes is None:
            notes = self._notes[sequence] = _Notes()
        notes.text.extend(sequence.token_ids(len(notes.text), sequence.num_tokens))
        length, tokens = notes.text.guess(min(limit, self._max_drafts))
        if not length:
            return None
        notes.latest = min(length, len(PRIORS)) - 1
        return _Offer(index, tokens, notes.experiences[notes.latest])

    def _choose(self, offers: Seq[_Offer], rows: Seq[Scheduled], budget: int) -> None:
        """The likeliest ones, as many as bring the most beyond WORTH times their cost."""
        num_rows = sum(row.num_tokens for row in rows)
        size = _in_tiles(num_rows)
        # Of one more row, in tokens.
        price = WORTH * sum(row.samples for row in rows) / (self._cost.free_rows + size)
        chances = []
        for number, offer in enumerate(offers):
            each = offer.experience.probability
            chance = each
            for _ in offer.tokens:
                if chance < price / 2:  # not even in a tile that others began
                    break
                chances.append((chance, number))
                chance *= each
        chances.sort(reverse=True)
        best, num_best, gain = 0.0, 0, 0.0
        for count, (chance, _) in enumerate(chances[:budget], start=1):
            gain += chance
            profit = gain - price * (_in_tiles(num_rows + count) - size)
            if profit > best:
                best, num_best = profit, count
        for _, number in chances[:num_best]:
            offers[number].num_taken += 1


def _in_tiles(num_rows: int) -> float:
    """What so many rows cost, in rows: one half by themselves, the other by their tiles."""
    return (num_rows + -(-num_rows // TILE_ROWS) * TILE_ROWS) / 2
