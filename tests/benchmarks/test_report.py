"""The table and the JSON, on made-up figures."""

from dataclasses import replace

from figures import Summary
from report import as_json, markdown
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
