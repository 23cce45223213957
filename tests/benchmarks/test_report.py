"""The tables and the JSON, on made-up figures."""

from dataclasses import replace

from agreement import Agreement, Leading
from figures import Summary
from processes import Memory
from report import as_json, rates, sizes, tokens
from waves import Shape

SUMMARY = Summary(
    decode=100.0,
    decode_waves=(100.0,),
    end_to_end=80.0,
    end_to_end_waves=(76.0, 80.0, 84.0),
    first_token_median=0.25,
    first_token_p90=0.5,
)
SLOW = replace(SUMMARY, decode=25.0, end_to_end_waves=(80.0,))
RESULTS = {
    Shape(8, 0): {"loraplex": SUMMARY, "vllm": SLOW},
    Shape(8, 8): {
        "loraplex": replace(SUMMARY, decode=75.0),
        "llama.cpp": replace(SLOW, one_by_one=True, cut=True),
        "peft": replace(SLOW, decode=None),
    },
}


def test_a_row_a_system_with_its_marks_and_what_they_mean() -> None:
    assert rates(RESULTS).splitlines()[2:] == [
        "| 8, 0 | Loraplex | 100.0 |  | 250 / 500 | 80.0 |  |",
        "| 8, 0 | vLLM | 25.0 |  | 250 / 500 | 80.0 | 4.00 |",
        "| 8, 8 | Loraplex | 75.0 | 0.75 | 250 / 500 | 80.0 |  |",
        "| 8, 8 | llama.cpp | 25.0 †‡ |  | 250 / 500 | 80.0 | 3.00 |",
        "| 8, 8 | PEFT |  |  | 250 / 500 | 80.0 |  |",
        "",
        "† requests did not all decode together: from the wave's first token to its last.",
        "‡ a wave was stopped at its time limit: of what came until then, and TTFT at least this.",
        "Repeats of one wave lie up to 10% apart.",
    ]


def test_json_has_every_wave_and_both_ratios() -> None:
    base, mixed = as_json(RESULTS)

    assert base["loraplex_over"] == {"vllm": 4.0}
    assert (mixed["batch"], mixed["adapters"]) == (8, 8)
    assert mixed["loraplex_over"] == {"llama.cpp": 3.0, "peft": None}
    systems = mixed["systems"]
    assert isinstance(systems, dict)
    assert systems["loraplex"]["of_own_base"] == 0.75
    assert systems["loraplex"]["end_to_end_waves"] == (76.0, 80.0, 84.0)
    assert systems["llama.cpp"]["cut"] is True


def test_memory_and_tokens_have_a_row_a_system() -> None:
    found = {
        "loraplex": Agreement({"peft": Leading(12.0, 9.5)}, changed=4),
        "vllm": Agreement({"peft": Leading(16.0, None)}, changed=None),
        "polylora": Agreement({"peft": Leading(16.0, 2.0)}, changed=0),
    }

    assert sizes({"vllm": Memory(pss=3000.4, peak=3500.0)}).endswith("| vLLM | 3000 | 3500 |")
    assert tokens(found).splitlines() == [
        "| leading tokens equal, of 16: base / an adapter a row | as PEFT "
        "| rows of 8 that adapters change |",
        "| --- | ---: | ---: |",
        "| Loraplex | 12 / 9.5 | 4 |",
        "| vLLM | 16 |  |",
        "| polylora | 16 / 2 | 0 (ignores its adapters) |",
    ]
