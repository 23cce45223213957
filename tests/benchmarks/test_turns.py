"""The order of turns, the check that everyone did the same work, and who is left out."""

from dataclasses import replace

import pytest
from child import BenchmarkError
from figures import Arrival
from turns import WARM_UP_TOKENS, Measurement, System, Turn, turns
from waves import Reply, Shape, Wave, Workload

BASE, MIXED = Shape(2, 0), Shape(2, 2)
WORKLOAD = Workload(("a", "b"), vocab_size=10, prompt_tokens=3, max_tokens=6, seconds=600.0, seed=1)


class FakePeer:
    """A token a second for each request; `short` of what was asked for, or out of order."""

    pid = None

    def __init__(self, short: int = 0, failing_from: int | None = None) -> None:
        self._short = short
        self._failing_from = failing_from
        self.waves: list[Wave] = []

    def run(self, wave: Wave) -> list[Reply]:
        if len(self.waves) == self._failing_from:
            raise BenchmarkError("it ended too early")
        self.waves.append(wave)
        count = max(wave.max_tokens - self._short, 0)
        timeline = tuple(Arrival(1.0 + i, 1) for i in range(count))
        return [Reply(timeline, (7,) * count) for _ in wave.prompts]


def systems(ours: FakePeer, peer: FakePeer) -> list[System]:
    return [System("ours", ours, repeats=2), System("peer", peer, repeats=2)]


def test_systems_and_shapes_of_a_batch_take_turns() -> None:
    ours, peer = System("ours", FakePeer(), repeats=2), System("peer", FakePeer(), repeats=1)
    order = list(turns([BASE, MIXED], [ours, peer]))

    assert order[:4] == [Turn(s, None, each) for s in (BASE, MIXED) for each in (ours, peer)]
    assert order[4:8] == [Turn(s, 0, each) for s in (BASE, MIXED) for each in (ours, peer)]
    assert order[8:] == [Turn(BASE, 1, ours), Turn(MIXED, 1, ours)]


def test_a_batch_is_finished_before_the_next() -> None:
    order = turns([Shape(1, 0), Shape(8, 0), Shape(8, 1)], [System("ours", FakePeer(), 2)])

    assert [turn.shape.batch for turn in order] == [1] * 3 + [8] * 6


def test_a_system_without_adapters_is_asked_for_the_base_alone() -> None:
    plain = System("plain", FakePeer(), repeats=1, mixes=False)

    assert {turn.shape for turn in turns([BASE, MIXED], [plain])} == {BASE}


def test_everyone_gets_the_same_waves_and_warm_ups_are_not_counted() -> None:
    ours, peer = FakePeer(), FakePeer()
    told: list[Turn] = []

    results = Measurement(WORKLOAD, [BASE, MIXED], systems(ours, peer)).run(told.append).results

    assert ours.waves == peer.waves
    assert [wave.max_tokens for wave in ours.waves] == [WARM_UP_TOKENS] * 2 + [6] * 4
    assert len(told) == len(ours.waves) + len(peer.waves)
    assert list(results) == [BASE, MIXED]
    assert list(results[MIXED]) == ["ours", "peer"]
    assert results[MIXED]["ours"].decode_waves == (2.0, 2.0)


def test_tokens_that_are_missing_before_the_time_is_up_are_an_error() -> None:
    measurement = Measurement(WORKLOAD, [BASE], systems(FakePeer(short=1), FakePeer()))

    with pytest.raises(BenchmarkError, match=r"ours generated \[3, 3\] tokens for 2 requests"):
        measurement.run(lambda turn: None)


def test_a_peer_that_ends_is_left_out_from_there_on() -> None:
    peer = FakePeer(failing_from=3)
    measured = Measurement(WORKLOAD, [BASE, MIXED], systems(FakePeer(), peer)).run(lambda _: None)

    assert len(peer.waves) == 3
    assert list(measured.results[BASE]) == ["ours", "peer"]
    assert list(measured.results[MIXED]) == ["ours"]
    assert measured.remarks == ["peer is left out from batch 2, 2 adapters on: it ended too early"]


def test_a_wave_beyond_a_peers_patience_is_not_repeated() -> None:
    ours, peer = FakePeer(), FakePeer()
    ours_too = System("ours", ours, repeats=3)
    impatient = System("peer", peer, repeats=3, patience=5.0)
    Measurement(WORKLOAD, [BASE], [ours_too, impatient]).run(lambda _: None)

    assert (len(ours.waves), len(peer.waves)) == (4, 2)


def test_a_wave_that_was_stopped_counts_as_far_as_it_came() -> None:
    at_once = replace(WORKLOAD, seconds=0.0)
    peer, mute = FakePeer(short=2), FakePeer(short=9)
    measured = Measurement(at_once, [BASE], systems(peer, mute)).run(lambda _: None)

    assert measured.results[BASE]["ours"].cut
    assert measured.results[BASE]["ours"].decode == 2.0
    assert list(measured.results[BASE]) == ["ours"]
    assert measured.remarks == ["peer, batch 2, 0 adapters: not one token after 0 s, left out"]
