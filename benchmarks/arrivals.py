"""When requests are due: a Gamma renewal process, of which Poisson is one."""

import math
import random
from itertools import accumulate


def arrival_times(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds from the start at which each of `count` requests is due, ascending.

    Gaps are Gamma distributed with shape `burstiness` and mean 1/rate; their coefficient of
    variation is burstiness^-1/2. Burstiness 1 is a Poisson process, less comes in bursts, infinity
    is evenly spaced; an infinite rate is everything at once. The words and their meaning are those
    of `vllm bench serve`, and as there the times are stretched until the last is count/rate: seeds
    differ in their pattern, not in their load.
    """
    if not (rate > 0 and burstiness > 0):
        raise ValueError("rate and burstiness are positive")
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(number + 1) / rate for number in range(count)]
    times = list(accumulate(rng.gammavariate(burstiness, 1 / burstiness) for _ in range(count)))
    if not times or times[-1] == 0:  # bursts so extreme that every gap is nothing
        return [0.0] * count
    return [time * count / (rate * times[-1]) for time in times]
