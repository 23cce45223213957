"""What is said about runs."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import plots
import pytest
from load import Run
from serving_report import Report, as_json, markdown

from tests.benchmarks.timelines import outcome, run

SETTINGS = {
    "served_model": "tiny",
    "device": "cpu",
    "pace": "an open loop",
    "adapter": [],
    "num_adapters": 2,
    "rank": [4, 16],
    "popularity": "uniform",
    "shared_prefix": 0,
    "prompt_tokens": "3",
    "max_tokens": "2",
    "own_server": False,
    "request_rate": math.inf,
    "burstiness": 1.0,
    "concurrency": None,
    "num_requests": 3,
    "label": None,
    "seed": 7,
}
ABOUT = {
    "date": "2026-11-22T10:31:05+00:00",
    "command": "python benchmarks/serving.py",
    "cpu": "a CPU",
    "cores": 2,
    "load_before": 0.5,
    "packages": {"loraplex": "0.1.0"},
    "revision": "abc",
}
OUTCOMES = (
    outcome(0.0, 1.0, 1.5, wait=0.5),
    outcome(0.0, 1.2, 1.9, adapter="b"),
    outcome(0.5, error="RESOURCE_EXHAUSTED QUEUE_FULL"),
)

VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts"),
    *("request_rate", "burstiness", "max_concurrency", "duration", "completed", "failed"),
    *("total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"),
    *("output_throughput", "total_token_throughput", "max_output_tokens_per_s"),
    "max_concurrent_requests",
    *(
        f"{part}_{name}_ms"
        for part in ("mean", "median", "std", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
"""Of `vllm bench serve --save-result`."""

VLLM_DETAILS = {
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "errors"),
}


def report(runs: Sequence[Run], **settings: object) -> Report:
    return Report.of(runs, {"ttft": 1100.0}, {**SETTINGS, **settings}, ABOUT)


def test_json_has_the_keys_of_vllms_tool() -> None:
    record = json.loads(json.dumps(as_json(report([run(*OUTCOMES)]), detailed=True)))

    assert record.keys() >= VLLM_KEYS | VLLM_DETAILS
    assert record["date"] == "20261122-103105"
    assert record["request_rate"] == "inf"
    assert record["completed"] == 2
    assert record["request_goodput"] == 0.1
    assert record["mean_ttft_ms"] == pytest.approx(1100)
    assert record["ttfts"] == [1.0, 1.2, None]
    assert record["itls"] == [[0.5], [pytest.approx(0.7)], []]
    assert record["errors_by_code"] == {"RESOURCE_EXHAUSTED QUEUE_FULL": 1}
    assert record["seed"] == 7
    assert record["environment"] == ABOUT
    assert record["adapters"]["b"]["output_tokens"] == 2
    assert not record.keys() & {"generated_texts"}
    plain = as_json(report([run(*OUTCOMES)]), detailed=False)
    assert not plain.keys() & VLLM_DETAILS


def test_tables_for_people() -> None:
    text = markdown(report([run(*OUTCOMES)]))

    for row in (
        "| requests | 2 of 3 completed, 1 failed |",
        "| goodput, requests/s | 0.10 |",
        "| requests that met the objectives | all 33%, TTFT <= 1100 ms 33% |",
        "| TTFT p50 (ms), adapter not resident / resident | 1000.0 (1) / 1200.0 (1) |",
        "| error RESOURCE_EXHAUSTED QUEUE_FULL | 1 |",
        "| TPOT (ms) | 600.0 | 600.0 | 680.0 | 698.0 | 100.0 |",
        "| b | 1 | 0 | 2 | 100% | 1200.0 | 1200.0 | 700.0 |",
    ):
        assert row in text
    assert "tiny on cpu, an open loop; 2 adapters of rank 4, 16, uniform" in text
    assert "seed 7" in text
    assert "Incomplete" not in text
    assert "WARNING" not in text


def test_an_interrupted_run_says_so() -> None:
    interrupted = report([run(*OUTCOMES), run(is_interrupted=True)])

    assert interrupted.is_incomplete
    assert "Incomplete" in markdown(interrupted)
    assert as_json(interrupted, detailed=False)["incomplete"] is True


def test_a_client_that_does_not_keep_up_is_warned_about() -> None:
    late = run(outcome(0.0, 1.0, sent=0.5))
    slow = Run(late.outcomes, 1, 0.0, 1.0, lags=[0.05], cpu_share=0.95)

    said = report([slow]).warnings()
    assert [warning.split(" (")[0] for warning in said] == [
        "the client sent late",
        "the client's event loop woke late",
        "the client was busy for 95% of a core: it may be the bottleneck",
    ]
    assert report([late], concurrency=1).warnings() == []


def test_answers_of_another_length_are_warned_about() -> None:
    short = outcome(0.0, 1.0)
    short.counts[0] = 2

    assert report([run(short)]).warnings() == [
        "1 answers were not as long as they were asked to be"
    ]


def test_plots(tmp_path: Path) -> None:
    many = [outcome(0.0, 1.0, 9.0, adapter=f"a{i}") for i in range(40)]
    for number, outcomes in enumerate([OUTCOMES, many, ()]):
        path = tmp_path / f"{number}.png"
        plots.save(path, [run(*outcomes), run()], "a title")
        assert path.read_bytes().startswith(b"\x89PNG")
