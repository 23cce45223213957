"""What clients get over seconds of load: shares, waits and gaps, in simulated time."""

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.engine.simulation import Ask, Fate, Simulation, jain, poisson, quantile

CLIENTS = "abcdefg"
SECONDS = 14.0
CAPACITY = 36.0  # requests of 64 and 64 tokens a second, with 64 places


def steady() -> list[Ask]:
    """Seven clients that ask for 60% of the capacity together."""
    rate = 0.6 * CAPACITY / len(CLIENTS)
    return [ask for client in CLIENTS for ask in poisson(rate, SECONDS, client, seed=1)]


def flood() -> list[Ask]:
    """Ten times a fair share of eight."""
    return poisson(10 * CAPACITY / 8, SECONDS, "flood", seed=1)


@cache
def calm() -> list[Fate]:
    return Simulation(max_running=64).run(steady())


def of(client: str, fates: list[Fate]) -> list[Fate]:
    return [fate for fate in fates if fate.ask.client == client]


def slow(fates: list[Fate], part: float) -> float:
    return quantile((fate.ttft for fate in fates), part)


def backlogged(outputs: dict[str, int], prompts: dict[str, int]) -> Simulation:
    """For ten seconds each client has more to do than the server can."""
    simulation = Simulation(max_running=64)
    asks = [
        Ask(0.001 * index, client, prompts[client], outputs[client])
        for index in range(150)
        for client in outputs
    ]
    simulation.run(asks, until=10.0)
    return simulation


def shares(simulation: Simulation) -> list[float]:
    """Service of each after the first two seconds."""
    served = simulation.service.values()
    return [sum(amount for when, amount in one if when > 2) for one in served]


def test_a_flood_leaves_the_others_what_they_ask_for() -> None:
    fates = Simulation(max_running=64).run(steady() + flood(), until=SECONDS + 2)
    for client in CLIENTS:
        own = of(client, fates)
        ended = [fate for fate in own if len(fate.times) == fate.ask.output]
        assert len(ended) >= 0.95 * len(own)
        # Of forty requests each, the last percent is a single one.
        assert slow(ended, 0.9) <= 2 * slow(of(client, calm()), 0.9)
    others = [fate for fate in fates if fate.times and fate.ask.client != "flood"]
    assert slow(others, 0.99) <= 2 * slow(calm(), 0.99)
    assert len([fate for fate in of("flood", fates) if fate.times]) > 100  # nothing lies idle


@pytest.mark.parametrize(
    ("outputs", "prompts"),
    [
        (dict.fromkeys("abcdefgh", 64), dict.fromkeys("abcdefgh", 64)),
        # Long answers hold their places for long, and long prompts take a step's tokens.
        (
            {**dict.fromkeys("abcdef", 32), "g": 256, "h": 64},
            {**dict.fromkeys("abcdefg", 64), "h": 512},
        ),
    ],
)
def test_all_that_are_backlogged_are_served_alike(
    outputs: dict[str, int], prompts: dict[str, int]
) -> None:
    simulation = backlogged(outputs, prompts)
    assert jain(shares(simulation)) > 0.98
    assert simulation.num_preempted < 0.1 * len(simulation.fates)


def test_a_newcomer_gets_a_place_from_those_who_have_them_all() -> None:
    long = [Ask(0.0, "long", 64, 4000) for _ in range(64)]
    simulation = Simulation(max_running=64)
    (newcomer,) = of("new", simulation.run([*long, Ask(5.0, "new", 64, 64)], until=9.0))
    assert newcomer.ttft < 1.0
    assert len(newcomer.times) == 64
    assert simulation.num_preempted == 1


def test_a_higher_priority_waits_for_nobody_below() -> None:
    crowd = [Ask(0.0, client, 64, 400) for client in "abcd" for _ in range(60)]
    high = [Ask(3.0 + index / 10, "a", 64, 20, priority=1) for index in range(10)]
    simulation = Simulation(max_running=64)
    fates = simulation.run(crowd + high, until=8.0)
    assert max(fate.ttft for fate in fates if fate.ask.priority) < 0.2


def test_a_long_prompt_does_not_stall_streams() -> None:
    streams = [Ask(0.01 * index, "abcdefgh"[index % 8], 64, 350) for index in range(16)]
    fates = Simulation(noise=0.05).run([*streams, Ask(1.5, "long", 4096, 1)])
    long = fates.pop()
    gaps = {True: list[float](), False: list[float]()}  # while it is prefilled, and before
    for fate in fates:
        for after, gap in zip(fate.times[1:], fate.gaps, strict=True):
            if 1.0 < after < long.times[0]:
                gaps[after > long.ask.at].append(gap)
    assert len(gaps[True]) > 500
    assert quantile(gaps[True], 0.99) <= 2 * quantile(gaps[False], 0.5)
    assert long.ttft < 6.0  # it gets on all the same


def test_a_burst_is_not_held_up_by_its_own_first_answers() -> None:
    warm = [Ask(0.0, client, 64, 8) for client in "abcdefgh"]
    burst = [Ask(2.0, "abcdefgh"[index % 8], 64, 64) for index in range(32)]
    median = {}
    for paced in (False, True):
        fates = Simulation(max_running=64, paced=paced).run(warm + burst)
        median[paced] = quantile((fate.ttft for fate in fates[8:]), 0.5)
    assert median[True] <= 1.05 * median[False]


def test_those_whose_adapter_runs_come_first_where_it_breaks_no_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = random.Random(3)
    names, weights = (
        [f"z{index}" for index in range(100)],
        [1 / (1 + index) for index in range(100)],
    )
    asks = [Ask(0.02 * i, source.choices(names, weights)[0]) for i in range(500)]
    distinct = {}
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr("loraplex.engine.admission.GROUPED", 1e-9)
        simulation = Simulation()
        simulation.run(asks, until=10.0)
        distinct[grouped] = sum(simulation.num_adapters) / len(simulation.num_adapters)
        busiest = [sum(amount for _, amount in simulation.service[name]) for name in names[:5]]
        assert jain(busiest) > 0.9
    assert distinct[True] < 0.9 * distinct[False]


ASKS = st.builds(
    Ask,
    at=st.floats(0, 1),
    client=st.sampled_from(["", *"abc"]),
    prompt=st.integers(1, 300),
    output=st.integers(1, 60),
    priority=st.sampled_from([0, 0, 0, 1]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ASKS, max_size=25), st.integers(1, 6), st.integers(24, 60))
def test_every_request_ends(asks: list[Ask], max_running: int, num_blocks: int) -> None:
    simulation = Simulation(max_running=max_running, num_blocks=num_blocks)
    assert all(len(fate.times) == fate.ask.output for fate in simulation.run(asks))
    simulation.scheduler.check_integrity()
