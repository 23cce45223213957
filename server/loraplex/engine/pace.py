"""How many prompt tokens a step may hold beside running streams: an online model of its time. Pure.

    time = a + b * streams + c * their context + d * prompt tokens + e * (prompt tokens * context)

The five are followed by a Kalman filter whose state walks at random, one measured step at a time:
Sorenson, "Least-squares estimation: from Gauss to Kalman" (1970). Errors count in relation to the
step's time; one that is out of line with the last ones, as a busy machine makes them, is cut down
to what would be in line. What no step tells apart, such as the cost of a prompt token
while there are none, keeps its estimate and grows uncertain only up to where it began.
"""

from collections.abc import Sequence as Seq
from math import sqrt

from loraplex.engine.step import StepLoad

QUANTUM = 16
"""Tokens: budgets are whole ones, and at least one, so that every prompt gets on."""

DEFAULT_BUDGET = 32
"""Tokens, until the model has seen enough."""

MIN_STEPS = 8
MIN_PREFILL_STEPS = 2
"""So many steps, and so many with a prompt among them, are enough."""

CONTEXT_UNIT = 1024.0  # tokens; keeps the five of one order
NOISE = 0.05  # of a step's time: no less is expected of a measurement
WALK = 0.01  # of its first uncertainty: so far an estimate may move in one step
OUTLIER = 3.0  # times the usual error
FIRST = (1.0, 0.1, 0.5, 0.05, 0.05)
"""Uncertainty of each at first, in times of the first step that was measured."""


class Pace:
    """Mutable: the filter's state, and how many steps it has seen."""

    def __init__(self, share: float) -> None:
        """`share`: by such a part of its time prompts may lengthen a step that streams wait for."""
        self._share = share
        self._state = [0.0] * len(FIRST)  # seconds a unit of each feature
        self._spread = [[0.0] * len(FIRST) for _ in FIRST]  # their covariance
        self._first: list[float] = []  # variances at first
        self._error = NOISE  # the usual one, relative
        self._num_steps = 0
        self._num_prefill_steps = 0

    def learn(self, load: StepLoad, seconds: float) -> None:
        """A step took so long. One with drafts is passed over: they do not cost what prompt
        tokens do."""
        if seconds <= 0 or load.num_drafts:
            return
        if not self._first:
            self._begin(seconds)
        self._num_steps += 1
        self._num_prefill_steps += load.num_prefill > 0
        features = _features(load)
        expected = max(_dot(self._state, features), seconds / 100)
        # All is divided by the time, so that long steps do not drown short ones.
        scale = min(expected, seconds) if self._num_steps > MIN_STEPS else seconds
        error = (seconds - _dot(self._state, features)) / scale
        if self._num_steps > MIN_STEPS:
            limit = OUTLIER * self._error
            error = max(-limit, min(limit, error))
        self._error += 0.05 * (abs(error) - self._error)
        self._error = max(self._error, NOISE)
        self._correct([feature / scale for feature in features], error)

    def seconds(self, load: StepLoad) -> float:
        """What such a step is expected to take."""
        # Several costs that always come together are known by their sum alone, and one of them may
        # be estimated below nothing.
        return max(0.0, _dot(self._state, _features(load)))

    def budget(self, num_streams: int, context: int, position: int, weight: float = 1.0) -> int:
        """Prompt tokens for a step with so many streams, which read `context` tokens together.

        The prompt goes on from `position`. `weight` times the share may be spent. Whole quanta, at
        least one.
        """
        if self._num_steps < MIN_STEPS or self._num_prefill_steps < MIN_PREFILL_STEPS:
            return DEFAULT_BUDGET
        streams = self.seconds(StepLoad(num_streams, context, 0, 0))
        allowed = self._share * weight * streams
        read = max(0.0, self._state[4]) / CONTEXT_UNIT
        token = self._state[3] + read * position
        if token <= 0:
            return DEFAULT_BUDGET
        # The larger n of allowed = token * n + read / 2 * n^2, written so that read may be 0.
        num_tokens = 2 * allowed / (token + sqrt(token * token + 2 * read * allowed))
        return max(1, int(num_tokens) // QUANTUM) * QUANTUM

    def _begin(self, seconds: float) -> None:
        self._first = [(seconds * part) ** 2 for part in FIRST]
        for index, variance in enumerate(self._first):
            self._spread[index][index] = variance

    def _correct(self, features: Seq[float], error: float) -> None:
        spread = self._spread
        for index, variance in enumerate(self._first):
            row = spread[index]
            row[index] = min(row[index] + WALK * WALK * variance, max(variance, row[index]))
        gains = [_dot(row, features) for row in spread]
        total = _dot(gains, features) + self._error * self._error
        for i, gain in enumerate(gains):
            self._state[i] += gain * error / total
            spread[i] = [
                value - gain * other / total for value, other in zip(spread[i], gains, strict=True)
            ]


def _features(load: StepLoad) -> tuple[float, ...]:
    return (
        1.0,
        load.num_decode,
        load.context / CONTEXT_UNIT,
        load.num_prefill,
        load.prefill_context / CONTEXT_UNIT,
    )


def _dot(left: Seq[float], right: Seq[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
