"""Which figures are held against which, on made-up ones."""

from figures import Summary
from verdicts import checks
from waves import Shape


def rate(decode: float | None, first: float = 1.0) -> Summary:
    return Summary(decode, (decode,), 1.0, (1.0,), first, first)


RESULTS = {
    Shape(1, 0): {"loraplex": rate(60.0), "vllm": rate(30.0), "llama.cpp": rate(120.0)},
    Shape(1, 1): {"loraplex": rate(54.0), "llama.cpp": rate(60.0)},
    Shape(8, 0): {"loraplex": rate(300.0), "vllm": rate(200.0), "llama.cpp": rate(250.0)},
    Shape(8, 8): {"loraplex": rate(200.0), "vllm-lora": rate(40.0)},
    Shape(32, 0): {"loraplex": rate(800.0), "vllm": rate(500.0, 0.8), "peft": rate(300.0, 2.0)},
    Shape(32, 8): {
        "loraplex": rate(600.0, 0.6),
        "vllm-lora": rate(100.0),
        "peft": rate(None),
        "polylora": rate(400.0),
    },
    Shape(32, 16): {"loraplex": rate(400.0)},
}


def test_each_check_names_its_peer_and_takes_the_best() -> None:
    found = {check.what: check for check in checks(RESULTS, ignoring=["polylora"])}

    assert {what: round(check.value, 3) for what, check in found.items()} == {
        "batch 32, 8 adapters mixed, over the best peer's base alone (vLLM)": 1.2,
        "batch 8, 8 adapters mixed, over the best peer's base alone (llama.cpp)": 0.8,
        "batch 32, 8 adapters mixed, over the best mixed of any peer (vLLM, LoRA on)": 6.0,
        "batch 1, base, over llama.cpp's": 0.5,
        "batch 1, base, over vLLM's": 2.0,
        "batch 1, 1 adapters, over our own base": 0.9,
        "batch 32, 8 adapters, over our own base": 0.75,
        "batch 32, 16 adapters, over our own base": 0.5,
        "TTFT median, batch 32, 8 adapters, over the best peer's base alone (vLLM)": 0.75,
    }
    assert [check.passed for check in found.values()] == [
        *(True, False, True, False, True, True),
        *(False, False, True),
    ]


def test_without_peers_only_our_own_base_is_left() -> None:
    alone = {shape: {"loraplex": found["loraplex"]} for shape, found in RESULTS.items()}

    assert [check.limit for check in checks(alone)] == [0.85, 0.85, 0.78]
