"""Gaps of the streams beside a prefill and without, of the same run."""

import pytest
from long_prompt import Run, figures_of

from tests.benchmarks.timelines import outcome


def test_a_run_compares_its_windows() -> None:
    """Two streams of a token every 0.1 s, and every 0.5 s while a prompt is prefilled."""
    moments = [0.0, 0.1, 0.2, 0.3, 0.8, 1.3, 1.8, 1.9, 2.0, 2.1]
    run = Run(
        outcomes=[outcome(-1.0, *moments) for _ in range(2)],
        quiet=[(0.05, 0.25), (1.85, 2.05)],
        prefill=[(0.31, 1.79)],
    )

    figures = figures_of(run)

    assert (figures["quiet_gaps"], figures["gaps"]) == (12, 6)
    assert figures["p99_of_p50"] == pytest.approx(5.0)
    assert figures["ttft_seconds"] == pytest.approx(1.48)
    assert figures["quiet_tokens_per_second"] == pytest.approx(8 / 0.4)
    assert figures["prefill_tokens_per_second"] == pytest.approx(4 / 1.48)
