"""From the moments at which tokens arrived to tokens a second and time to first token."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Arrival(NamedTuple):
    """Tokens of one request that became known at one moment."""

    seconds: float  # since the wave was sent
    num_tokens: int


Timeline = tuple[Arrival, ...]
"""One request's arrivals, in order."""


def num_tokens(timeline: Timeline) -> int:
    return sum(arrival.num_tokens for arrival in timeline)


def first_token(timeline: Timeline) -> float:
    """Seconds from sending the wave to this request's first token."""
    return timeline[0].seconds


def end_to_end_rate(timelines: Sequence[Timeline]) -> float:
    """Every token of the wave, over the time from sending it to its last token."""
    last = max((timeline[-1].seconds for timeline in timelines if timeline), default=0.0)
    return sum(map(num_tokens, timelines)) / last if last else 0.0


def decode_rate(timelines: Sequence[Timeline]) -> float | None:
    """Tokens a second while all requests decode, and none prefills or has ended.

    The span is from the last request's first token to the first request's last token. Within it
    each request's rate is its tokens after its first arrival there, over the time since that
    arrival; the rates add up. A static batch and continuous batching are thus asked the same.
    None where there is no such span: too few tokens, or too few requests running together.
    """
    begin = max(timeline[0].seconds for timeline in timelines)
    end = min(timeline[-1].seconds for timeline in timelines)
    total = 0.0
    for timeline in timelines:
        within = [arrival for arrival in timeline if begin <= arrival.seconds <= end]
        if len(within) < 2:
            return None
        total += num_tokens(tuple(within[1:])) / (within[-1].seconds - within[0].seconds)
    return total


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def draining_rate(timelines: Sequence[Timeline]) -> float | None:
    """Tokens a second from the wave's first token to its last, first tokens not counted.

    For systems that do not decode all requests together. What others' prefill takes is in it.
    """
    answered = [timeline for timeline in timelines if timeline]
    if not answered:
        return None
    begin = min(timeline[0].seconds for timeline in answered)
    end = max(timeline[-1].seconds for timeline in answered)
    tokens = sum(num_tokens(timeline[1:]) for timeline in answered)
    return tokens / (end - begin) if tokens and end > begin else None


def _is_telling(timelines: Sequence[Timeline], asked: int) -> bool:
    """Whether a wave, stopped perhaps, came far enough for a rate: an eighth of its tokens."""
    return 8 * sum(map(num_tokens, timelines)) >= asked * len(timelines)


@dataclass(frozen=True, slots=True)
class Summary:
    """One system's figures for one shape, over all repeats."""

    decode: float | None  # tokens/s, median of the waves
    decode_waves: tuple[float | None, ...]
    end_to_end: float  # tokens/s, median of the waves
    end_to_end_waves: tuple[float, ...]
    first_token_median: float  # seconds, over the requests of all waves
    first_token_p90: float
    one_by_one: bool = False  # requests did not run together: `decode` is of draining the wave
    cut: bool = False  # a wave was stopped before its end: figures are of what came until then

    @classmethod
    def of(cls, waves: Sequence[Sequence[Timeline]], asked: int, seconds: float) -> "Summary":
        """`asked` tokens of each request, within that time; then a wave was stopped.

        A request without a first token by then counts as one that got it then.
        """
        together = [decode_rate(wave) if all(wave) else None for wave in waves]
        decode = tuple(
            rate or (draining_rate(wave) if _is_telling(wave, asked) else None)
            for wave, rate in zip(waves, together, strict=True)
        )
        known = [rate for rate in decode if rate is not None]
        end_to_end = tuple(end_to_end_rate(wave) for wave in waves)
        first_tokens = [
            first_token(timeline) if timeline else seconds for wave in waves for timeline in wave
        ]
        return cls(
            decode=statistics.median(known) if known else None,
            decode_waves=decode,
            end_to_end=statistics.median(end_to_end),
            end_to_end_waves=end_to_end,
            first_token_median=percentile(first_tokens, 50),
            first_token_p90=percentile(first_tokens, 90),
            one_by_one=None in together,
            cut=any(num_tokens(timeline) < asked for wave in waves for timeline in wave),
        )

    @property
    def spread(self) -> float:
        """How far the waves' end-to-end rates lie apart, as a part of their median."""
        distance = max(self.end_to_end_waves) - min(self.end_to_end_waves)
        return distance / self.end_to_end if self.end_to_end else 0.0
