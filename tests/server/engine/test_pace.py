"""What the model of a step's time learns, and the budgets it gives."""

import random

import pytest
from loraplex.engine.pace import DEFAULT_BUDGET, MIN_BUDGET, QUANTUM, Pace
from loraplex.engine.step import StepLoad

from tests.server.engine.simulation import Costs

COSTS = Costs()


def prefill(num_streams: int, context: int, num_tokens: int, position: int) -> StepLoad:
    read = num_tokens * position + num_tokens * num_tokens // 2
    return StepLoad(num_streams, context, num_tokens, read)


def experienced(costs: Costs = COSTS, noise: float = 0.0, spikes: float = 0.0) -> Pace:
    """Two steps with prompts, and then streams alone, of which some take far too long."""
    source = random.Random(0)
    pace = Pace(0.7)
    loads = [prefill(0, 0, 512, 0), prefill(8, 512, 512, 0)]
    loads += [StepLoad(16, 1024 + 16 * count, 0, 0) for count in range(200)]
    for load in loads:
        seconds = costs.of(load, 0) * (1 + abs(source.gauss(0, noise)))
        pace.learn(load, seconds * (4 if source.random() < spikes else 1))
    return pace


def test_until_it_knows_enough_the_budget_is_small() -> None:
    pace = Pace(0.7)
    assert pace.budget(StepLoad(8, 1000, 0, 0), 0) == DEFAULT_BUDGET
    for _ in range(100):
        pace.learn(StepLoad(8, 1000, 0, 0), 0.01)
    pace.learn(StepLoad(8, 1000, 0, 0), 0.0)  # no time at all teaches nothing
    assert (
        pace.budget(StepLoad(8, 1000, 0, 0), 0) == DEFAULT_BUDGET
    )  # what prompts cost is not known


@pytest.mark.parametrize(("noise", "spikes", "most"), [(0, 0, 1.7), (0.05, 0, 1.9), (0.1, 0.02, 2)])
@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_prompts_lengthen_a_step_by_their_share(
    noise: float, spikes: float, most: float, scale: float
) -> None:
    costs = Costs(*(scale * cost for cost in (6e-3, 0.13e-3, 0.14e-3, 0.045e-6)))
    pace, source, position, ratios = experienced(costs, noise, spikes), random.Random(1), 0, []
    while position < 4096:
        num_tokens = pace.budget(StepLoad(16, 4000, 0, 0), position)
        load = prefill(16, 4000, num_tokens, position)
        ratios.append(costs.of(load, 0) / costs.of(StepLoad(16, 4000, 0, 0), 0))
        pace.learn(load, costs.of(load, 0) * (1 + abs(source.gauss(0, noise))))
        position += num_tokens
    assert sorted(ratios)[int(0.95 * len(ratios))] <= most
    assert sum(ratios) / len(ratios) >= 1.4


def test_what_a_long_prompt_costs_by_being_there_is_not_taken_for_its_tokens_price() -> None:
    """Nor for the streams': it grows as the prompt goes on, and the budget falls."""
    pace, position, ratios, budgets = experienced(), 0, list[float](), list[int]()
    while position < 4096:
        streams = StepLoad(16, 4000, 0, 0)
        load = prefill(16, 4000, pace.budget(streams, position), position)
        alone = COSTS.of(streams, 0)
        seconds = COSTS.of(load, 0) + (0.7e-3 + 2e-3 * position / 4096 if load.num_prefill else 0)
        pace.learn(load, seconds)
        budgets.append(load.num_prefill)
        ratios.append(seconds / alone)
        position += load.num_prefill
    assert sorted(ratios)[int(0.99 * len(ratios))] <= 2.0
    assert sorted(ratios)[len(ratios) // 2] >= 1.6
    assert budgets[-2] < budgets[10]


def test_steps_of_prompts_alone_do_not_charge_prompts_for_the_reading_of_the_weights() -> None:
    pace, source = experienced(), random.Random(1)
    for count in range(200):
        load = prefill(16 * (count % 10 == 0), 2000, source.randint(32, 256), 0)
        pace.learn(load, COSTS.of(load, 0))
    mixed = prefill(16, 2000, 32, 0)
    assert pace.seconds(mixed) == pytest.approx(COSTS.of(mixed, 0), rel=0.05)


def test_streams_are_seen_alone_now_and_then() -> None:
    """They got quicker during a long prompt, which the steps with one do not tell."""
    pace = experienced()
    streams, quicker = StepLoad(16, 4000, 0, 0), Costs(step=1e-3)
    for position in range(0, 64 * 16, 16):
        assert pace.budget(streams, position) > 0
        pace.learn(prefill(16, 4000, 16, position), quicker.of(prefill(16, 4000, 16, position), 0))
    assert pace.budget(streams, 1024) == pace.budget(streams, 1024, weight=4.0) == 0
    pace.learn(streams, quicker.of(streams, 0))
    assert pace.budget(streams, 1024) > 0


def test_streams_of_many_adapters_take_longer() -> None:
    pace = experienced()
    for count in range(400):
        adapters = count % 9
        load = StepLoad(16, 4000, 0, 0, num_adapters=adapters)
        pace.learn(load, COSTS.of(load, 0) + adapters * 1e-3)
    few, many = (pace.seconds(StepLoad(16, 4000, 0, 0, num_adapters=n)) for n in (1, 8))
    assert many - few == pytest.approx(7e-3, rel=0.1)


def test_budgets_are_whole_quanta_and_never_less_than_the_least() -> None:
    pace = experienced()
    loads = [StepLoad(streams, 100 * streams, 0, 0) for streams in (1, 8, 64)]
    budgets = [pace.budget(load, 0) for load in loads]
    assert budgets == sorted(budgets)
    assert all(budget % QUANTUM == 0 for budget in budgets)
    assert pace.budget(loads[1], 0, weight=4.0) > 2 * pace.budget(loads[1], 0)
    assert pace.budget(loads[1], position=10**7) == MIN_BUDGET


def test_drafts_say_nothing_of_prompts() -> None:
    pace, cheap = experienced(), experienced()
    for _ in range(300):
        cheap.learn(StepLoad(16, 4000, 0, 0, num_drafts=8), COSTS.of(StepLoad(16, 4000, 0, 0), 0))
    assert cheap.budget(StepLoad(16, 4000, 0, 0), 0) == pace.budget(StepLoad(16, 4000, 0, 0), 0)


def test_costs_that_change_are_followed() -> None:
    pace, slower = experienced(), Costs(step=12e-3, token=0.5e-3)
    for _ in range(60):
        pace.learn(prefill(16, 4000, 32, 0), slower.of(prefill(16, 4000, 32, 0), 0))
        pace.learn(StepLoad(16, 4000, 0, 0), slower.of(StepLoad(16, 4000, 0, 0), 0))
    load = prefill(16, 4000, 32, 0)
    assert pace.seconds(load) == pytest.approx(slower.of(load, 0), rel=0.1)
