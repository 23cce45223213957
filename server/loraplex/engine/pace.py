"""How many prompt tokens a step may hold beside running streams: an online model of its time. Pure.

    streams' part = a + b * streams + c * their context + d * their adapters
    prompts' part = e + f * tokens + g * context + h * tokens * context
    prompts alone = i + f * tokens + g * context + h * tokens * context

The streams' part is learnt from steps without prompts alone, and the prompts' from what a step with
some takes beyond it: their costs would be taken for each other's otherwise, since both grow as a
long prompt goes on. So now and then a step is left without a prompt.

What every step takes, such as the reading of the weights, is in a where there are streams, and in i
where there are none, or nothing is known of them yet.

The prices of each part are followed by a Kalman filter whose state walks at random, one measured
step at a time: Sorenson, "Least-squares estimation: from Gauss to Kalman" (1970). Errors count in
relation to the step's time; one that is out of line with the last ones, as a busy machine makes
them, is cut down to what would be in line. What no step tells apart, such as the cost of a prompt's
tokens and of its being there, keeps its estimate and grows uncertain only up to where it began.
"""

from collections.abc import Sequence as Seq
from math import sqrt

from loraplex.engine.step import StepLoad

QUANTUM = 4
"""Tokens: budgets are whole ones."""

MIN_BUDGET = 16
"""Tokens, so that every prompt gets on."""

DEFAULT_BUDGET = 32
"""Tokens, until the model has seen enough."""

MIN_STEPS = 8
MIN_PREFILL_STEPS = 2
"""So many steps of streams alone, and so many with a prompt, are enough."""

MAX_BLIND = 64
MAX_BLIND_AT_FIRST = 4
"""Steps with a prompt, one after the other; then comes one without."""

CONTEXT_UNIT = 1024.0  # tokens; keeps the features of one order
NOISE = 0.05  # of a step's time: no less is expected of a measurement
WALK = 0.01  # of its first uncertainty: so far an estimate may move in one step
OUTLIER = 3.0  # times the usual error
STREAMS = (1.0, 0.1, 0.5, 0.1)
PROMPTS = (0.3, 0.05, 0.3, 0.05, 1.0)
"""Uncertainty of each at first, in times of the first step that was measured."""


class Pace:
    """Mutable: what the two models have learnt."""

    def __init__(self, share: float) -> None:
        """`share`: by such a part of its time prompts may lengthen a step that streams wait for."""
        self._share = share
        self._streams = _Filter(STREAMS)
        self._prompts = _Filter(PROMPTS)
        self._num_blind = 0

    def learn(self, load: StepLoad, seconds: float) -> None:
        """A step took so long. One with drafts is passed over: they do not cost what prompt
        tokens do."""
        self._num_blind = self._num_blind + 1 if load.num_prefill else 0
        if seconds <= 0 or load.num_drafts:
            return
        if load.num_prefill:
            streams = self._streams_seconds(load)
            self._prompts.learn(_prompts(load, streams > 0), seconds - streams, seconds)
        else:
            self._streams.learn(_streams(load), seconds, seconds)

    def seconds(self, load: StepLoad) -> float:
        """What such a step is expected to take."""
        streams = self._streams_seconds(load)
        if not load.num_prefill:
            return streams
        return streams + max(0.0, self._prompts.estimate(_prompts(load, streams > 0)))

    def budget(self, streams: StepLoad, position: int, weight: float = 1.0) -> int:
        """Prompt tokens for a step with such streams; 0 where it is time to see them alone.

        The prompt goes on from `position`. `weight` times the share may be spent, less what such
        steps are usually out by.
        """
        knows_streams = self._streams.num_seen >= MIN_STEPS
        if self._num_blind >= (MAX_BLIND if knows_streams else MAX_BLIND_AT_FIRST):
            return 0
        if not knows_streams or self._prompts.num_seen < MIN_PREFILL_STEPS:
            return DEFAULT_BUDGET
        here, token, context, read, _ = self._prompts.state
        read = max(0.0, read) / CONTEXT_UNIT
        token = max(0.0, token) + read * position
        longer = self._share * weight
        longer -= self._prompts.error * (1 + longer)
        allowed = longer * self._streams_seconds(streams)
        allowed -= max(0.0, here + context * position / CONTEXT_UNIT)
        if allowed <= 0:
            return MIN_BUDGET
        if token <= 0:
            return DEFAULT_BUDGET
        # The larger n of allowed = token * n + read / 2 * n^2, written so that read may be 0.
        num_tokens = 2 * allowed / (token + sqrt(token * token + 2 * read * allowed))
        return max(MIN_BUDGET, int(num_tokens) // QUANTUM * QUANTUM)

    def _streams_seconds(self, load: StepLoad) -> float:
        """0: there are none, or nothing is known of them."""
        if not load.num_decode:
            return 0.0
        # Several costs that always come together are known by their sum alone, and one of them may
        # be estimated below nothing.
        return max(0.0, self._streams.estimate(_streams(load)))


class _Filter:
    """A sum of features, each with a price in seconds that is followed. Mutable."""

    def __init__(self, first: Seq[float]) -> None:
        """`first`: the prices' uncertainties, in times of the first step."""
        self.state = [0.0] * len(first)
        self.num_seen = 0
        self._first = first
        self._variances: list[float] = []  # at first, and at most
        self._spread = [[0.0] * len(first) for _ in first]  # the covariance
        self.error = NOISE  # the usual one, relative

    def estimate(self, features: Seq[float]) -> float:
        return _dot(self.state, features)

    def learn(self, features: Seq[float], seconds: float, step: float) -> None:
        """`seconds` went to the features, in a step that took `step` seconds as a whole."""
        if not self.num_seen:
            self._variances = [(step * part) ** 2 for part in self._first]
            for index, variance in enumerate(self._variances):
                self._spread[index][index] = variance
        self.num_seen += 1
        # All is divided by a time, so that long steps do not drown short ones.
        missed = seconds - self.estimate(features)
        scale = step if self.num_seen <= MIN_STEPS else max(step - max(0.0, missed), step / 100)
        error = missed / scale
        if self.num_seen > MIN_STEPS:
            limit = OUTLIER * self.error
            error = max(-limit, min(limit, error))
        self.error += 0.05 * (abs(error) - self.error)
        self.error = max(self.error, NOISE)
        self._correct([feature / scale for feature in features], error)

    def _correct(self, features: Seq[float], error: float) -> None:
        spread = self._spread
        for index, variance in enumerate(self._variances):
            row = spread[index]
            row[index] = min(row[index] + WALK * WALK * variance, max(variance, row[index]))
        gains = [_dot(row, features) for row in spread]
        total = _dot(gains, features) + self.error * self.error
        for i, gain in enumerate(gains):
            self.state[i] += gain * error / total
            spread[i] = [
                value - gain * other / total for value, other in zip(spread[i], gains, strict=True)
            ]


def _streams(load: StepLoad) -> tuple[float, ...]:
    return (1.0, load.num_decode, load.context / CONTEXT_UNIT, load.num_adapters)


def _prompts(load: StepLoad, has_streams: bool) -> tuple[float, ...]:
    context = load.prefill_context / CONTEXT_UNIT
    beside, alone = (1.0, 0.0) if has_streams else (0.0, 1.0)
    return (beside, load.num_prefill, context / load.num_prefill, context, alone)


def _dot(left: Seq[float], right: Seq[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
