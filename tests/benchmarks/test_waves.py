"""What waves are made of."""

from waves import Shape, Workload, round_robin, shapes

NAMES = ("a", "b", "c", "d")
WORKLOAD = Workload(NAMES, vocab_size=100, prompt_tokens=8, max_tokens=5, seconds=9.0, seed=1)


def test_shapes_have_no_more_adapters_than_requests() -> None:
    assert shapes([8, 1], [8, 0, 1, 16]) == [
        Shape(1, 0),
        Shape(1, 1),
        Shape(8, 0),
        Shape(8, 1),
        Shape(8, 8),
    ]


def test_round_robin_covers_base_identical_shared_and_distinct() -> None:
    assert round_robin(Shape(3, 0), NAMES) == (None, None, None)
    assert round_robin(Shape(3, 1), NAMES) == ("a", "a", "a")
    assert round_robin(Shape(5, 2), NAMES) == ("a", "b", "a", "b", "a")
    assert round_robin(Shape(4, 4), NAMES) == NAMES


def test_a_wave_has_the_asked_sizes() -> None:
    wave = WORKLOAD.wave(Shape(4, 2), repeat=0)

    assert [len(prompt) for prompt in wave.prompts] == [8] * 4
    assert all(0 <= token < 100 for prompt in wave.prompts for token in prompt)
    assert wave.adapters == ("a", "b", "a", "b")
    assert wave.num_tokens == 20


def test_waves_repeat_with_the_seed_and_differ_otherwise() -> None:
    wave = WORKLOAD.wave(Shape(4, 2), repeat=0)
    others = [WORKLOAD.wave(Shape(4, 2), repeat=1), WORKLOAD.wave(Shape(4, 1), repeat=0)]
    prompts = [prompt for each in (wave, *others) for prompt in each.prompts]

    assert wave == WORKLOAD.wave(Shape(4, 2), repeat=0)
    assert len(set(prompts)) == len(prompts)
