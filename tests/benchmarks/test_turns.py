"""The order of turns, and the check that everyone did the same work."""

import pytest
from child import BenchmarkError
from figures import Arrival, Timeline
from turns import WARM_UP_TOKENS, System, Turn, measure, turns
from workload import Shape, Wave, Workload

BASE, MIXED = Shape(2, 0), Shape(2, 2)
WORKLOAD = Workload(("a", "b"), vocab_size=10, prompt_tokens=3, max_tokens=6, seed=1)


class FakePeer:
    """A token a second for each request; `short` of what was asked for."""

    def __init__(self, short: int = 0) -> None:
        self._short = short
        self.waves: list[Wave] = []

    def run(self, wave: Wave) -> list[Timeline]:
        self.waves.append(wave)
        count = wave.max_tokens - self._short
        return [tuple(Arrival(1.0 + i, 1) for i in range(count)) for _ in wave.prompts]


def test_systems_and_shapes_of_a_batch_take_turns() -> None:
    order = list(turns([BASE, MIXED], {"ours": 2, "peer": 1}))

    assert order[:4] == [Turn(s, None, name) for s in (BASE, MIXED) for name in ("ours", "peer")]
    assert order[4:8] == [Turn(s, 0, name) for s in (BASE, MIXED) for name in ("ours", "peer")]
    assert order[8:] == [Turn(BASE, 1, "ours"), Turn(MIXED, 1, "ours")]


def test_a_batch_is_finished_before_the_next() -> None:
    order = turns([Shape(1, 0), Shape(8, 0), Shape(8, 1)], {"ours": 2})

    assert [turn.shape.batch for turn in order] == [1] * 3 + [8] * 6


def test_everyone_gets_the_same_waves_and_warm_ups_are_not_counted() -> None:
    ours, peer = FakePeer(), FakePeer()
    told: list[Turn] = []
    systems = [System("ours", ours, repeats=2), System("peer", peer, repeats=2)]

    results = measure(systems, WORKLOAD, [BASE, MIXED], told.append)

    assert ours.waves == peer.waves
    assert [wave.max_tokens for wave in ours.waves] == [WARM_UP_TOKENS] * 2 + [6] * 4
    assert len(told) == len(ours.waves) + len(peer.waves)
    assert list(results) == [BASE, MIXED]
    assert results[MIXED]["ours"].decode_waves == (2.0, 2.0)


def test_missing_tokens_are_an_error() -> None:
    systems = [System("ours", FakePeer(short=1), repeats=1)]

    with pytest.raises(BenchmarkError, match=r"ours generated \[3, 3\] tokens for 2 requests"):
        measure(systems, WORKLOAD, [BASE], lambda turn: None)
