"""Runs made by hand."""

from collections.abc import Sequence

from load import Run
from loraplex_client import Timings
from outcome import Outcome
from workload import Request


def outcome(
    due: float = 0.0,
    *arrivals: float,
    adapter: str | None = "a",
    sent: float | None = None,
    ended: float | None = None,
    wait: float = 0.0,
    error: str | None = None,
    counts: Sequence[int] = (),
    is_cut: bool = False,
) -> Outcome:
    """One that ends with its last token, unless something else is said."""
    number = list(counts) or [1] * len(arrivals)
    end = ended if ended is not None else (arrivals[-1] if arrivals else due)
    return Outcome(
        request=Request((1, 2, 3), adapter, max(1, sum(number)), due),
        due=due,
        sent=due if sent is None else sent,
        ended=None if is_cut else end,
        arrivals=list(arrivals),
        counts=number,
        timings=None if error or is_cut else Timings(queue=0.25, adapter_wait=wait),
        error=error,
    )


def run(*outcomes: Outcome, end: float = 10.0, is_interrupted: bool = False) -> Run:
    """From 0 to `end`."""
    return Run(outcomes, len(outcomes), 0.0, end, [0.001, 0.002], 0.1, is_interrupted)
