"""The table and the JSON, on made-up figures."""

from dataclasses import replace

from figures import Summary
from report import as_json, conditions, markdown
from workload import Shape

SUMMARY = Summary(
    decode=100.0,
    decode_waves=(100.0,),
    end_to_end=80.0,
    end_to_end_waves=(76.0, 80.0, 84.0),
    first_token_median=0.25,
    first_token_p90=0.5,
)
ALONE = {
    Shape(8, 0): {"loraplex": SUMMARY},
    Shape(8, 8): {"loraplex": replace(SUMMARY, decode=75.0)},
    Shape(32, 8): {"loraplex": replace(SUMMARY, decode=None)},
}
BESIDE = {
    shape: {**systems, "peft": replace(SUMMARY, decode=25.0)} for shape, systems in ALONE.items()
}


def test_a_row_a_shape_and_the_spread_below() -> None:
    assert markdown(ALONE).splitlines() == [
        "| batch | adapters | Loraplex decode tok/s | Loraplex of own base "
        "| Loraplex TTFT ms p50 / p90 | Loraplex end-to-end tok/s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
        "| 8 | 0 | 100.0 |  | 250 / 500 | 80.0 |",
        "| 8 | 8 | 75.0 | 0.75 | 250 / 500 | 80.0 |",
        "| 32 | 8 |  |  | 250 / 500 | 80.0 |",
        "",
        "Repeats of one wave lie up to 10% apart.",
    ]


def test_a_peer_adds_its_columns_and_the_ratio() -> None:
    header, _, *rows = markdown(BESIDE).splitlines()

    assert header.endswith("| PEFT end-to-end tok/s | Loraplex / PEFT, decode |")
    assert rows[0].endswith("| 25.0 |  | 250 / 500 | 80.0 | 4.00 |")
    assert rows[1].endswith("| 25.0 | 1.00 | 250 / 500 | 80.0 | 3.00 |")
    assert rows[2].endswith("| 25.0 |  | 250 / 500 | 80.0 |  |")


def test_json_has_every_wave_and_both_ratios() -> None:
    _, mixed, unknown = as_json(BESIDE)

    assert (mixed["batch"], mixed["adapters"]) == (8, 8)
    assert mixed["times_peer"] == {"peft": 3.0}
    assert unknown["times_peer"] == {"peft": None}
    systems = mixed["systems"]
    assert isinstance(systems, dict)
    assert systems["loraplex"]["of_own_base"] == 0.75
    assert systems["loraplex"]["end_to_end_waves"] == (76.0, 80.0, 84.0)


def test_one_repeat_has_no_spread() -> None:
    once = {Shape(8, 0): {"loraplex": replace(SUMMARY, end_to_end_waves=(80.0,))}}

    assert markdown(once).endswith("| 80.0 |")


def test_conditions_name_model_machine_and_versions() -> None:
    about = {
        "cpu": "A CPU",
        "cores": 2,
        "load_before": 0.1,
        "packages": {"torch": "2.13.0", "peft": None},
        "revision": "abc",
        "date": "2026-01-01",
    }
    settings = {
        "model": "tiny",
        "dtype": "bfloat16",
        "prompt_tokens": 64,
        "max_tokens": 32,
        "rank": 16,
        "threads": 2,
    }

    assert conditions(about, settings) == (
        "tiny, bfloat16, prompts of 64 tokens, 32 tokens out, adapters of rank 16 on all seven "
        "linears, 2 torch threads. A CPU, 2 cores, load 0.1 before the start; torch 2.13.0; "
        "revision abc; 2026-01-01."
    )
