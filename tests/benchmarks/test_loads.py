"""The loads of the benchmarks around adapters: what their clients ask for, and in which order."""

from itertools import islice

import pytest
from closed_loop import Prompts
from cold_start import Round
from many_adapters import Aliased, Draws
from mixed_ranks import rounded_up
from stall import LongStreams, Windows
from uploader import Moments
from workload import Request

PROMPTS = Prompts(10, 2, seed=1)


def request(adapter: str = "a", max_tokens: int = 64) -> Request:
    return Request((1,), adapter, max_tokens)


def test_a_rounds_first_requests_have_random_lengths() -> None:
    load = Round([request(str(i)) for i in range(5)], seed=1)
    requests = [load.next(client) for client in (0, 1, 1, 0, 0, 1)]

    assert [each.adapter for each in requests if each] == ["0", "1", "2", "3", "4"]
    lengths = [each.max_tokens for each in requests if each]
    assert all(length < 64 for length in lengths[:2])
    assert lengths[2:] == [64] * 3
    assert requests[-1] is None


def test_streams_end_one_after_another() -> None:
    load = LongStreams(["a", "b"], PROMPTS, max_tokens=100, num_clients=4)
    first = [load.next(client) for client in range(4)]

    assert [each.max_tokens for each in first] == [25, 50, 75, 100]
    assert [each.adapter for each in first] == ["a", "b", "a", "b"]
    assert load.next(0).max_tokens == 100


def test_phases_of_uploads_lie_end_to_end() -> None:
    windows = Windows([Moments(1.0, 2.0, 4.0, 7.0)])

    assert windows.busy() == [(1.0, 7.0)]
    phases = [windows.phase(name) for name in ("sending", "publishing", "loading")]
    assert phases == [[(1.0, 2.0)], [(2.0, 4.0)], [(4.0, 7.0)]]


def test_aliases_are_as_many_as_the_adapters_that_run() -> None:
    names = [f"many-{i}" for i in range(50)]
    plain = Draws(names, [1.0] * 50, PROMPTS, seed=3)
    aliased = Aliased(Draws(names, [1.0] * 50, PROMPTS, seed=3), names[:8])
    originals = [plain.next(0) for _ in range(200)]
    running: list[tuple[Request, Request]] = []
    seen = set()
    for original in originals:
        if len(running) == 8:
            aliased.done(running.pop(0)[1])
        running.append((original, aliased.next(0)))
        pairs = {(one.adapter, other.adapter) for one, other in running}
        assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
        seen |= {other.adapter for _, other in running}
    assert seen <= {*names[:8]}
    assert len(seen) == 8


def test_draws_repeat_with_the_seed() -> None:
    def some(seed: int) -> list[tuple[str | None, int]]:
        load = Draws(["a", "b"], [1.0, 1.0], PROMPTS, seed)
        requests = islice(iter(lambda: load.next(0), None), 20)
        return [(each.adapter, each.max_tokens) for each in requests]

    assert some(1) == some(1) != some(2)


@pytest.mark.parametrize(("rank", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64)])
def test_ranks_are_rounded_up(rank: int, expected: int) -> None:
    assert rounded_up(rank) == expected
