"""What the demo says about its own run."""

import pytest
from loraplex.demo import Summary

Record = dict[str, object]


def step(*digests: str | None, duration: float = 0.25) -> Record:
    return {
        "digests": list(digests),
        "request_ids": [f"r{index}" for index in range(len(digests))],
        "num_sampled": len(digests),
        "duration": duration,
    }


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], Summary(0, 0, 0.0, 0, 0)),
        ([step(None)], Summary(1, 1, 0.25, 0, 1)),
        ([step("a", "a", None)], Summary(1, 3, 0.25, 1, 3)),
        ([step("a", "b"), step("b", "c", "a"), step("c")], Summary(3, 6, 0.75, 3, 3)),
        ([step("a", "b"), step(None, None, None, None)], Summary(2, 6, 0.5, 2, 4)),
    ],
    ids=["nothing", "the base", "one adapter", "several", "widest in different steps"],
)
def test_a_summary_of_steps(steps: list[Record], expected: Summary) -> None:
    assert Summary.of(iter(steps)) == expected


def test_its_words() -> None:
    assert Summary(3, 60, 0.5, 4, 5).text() == (
        "60 tokens in 3 forward passes, 120 tokens/s. "
        "One pass served up to 5 requests with 4 different adapters."
    )
    assert Summary(0, 0, 0.0, 0, 0).text().startswith("0 tokens in 0 forward passes, 0 tokens/s.")
