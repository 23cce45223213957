"""What a server's log and metrics say, and the command that starts one."""

from pathlib import Path

import pytest
from child import BenchmarkError
from command import Check, table
from lifecycle import Counters, ServerSettings, metrics_url

METRICS = """\
# TYPE loraplex_memory_blocks gauge
loraplex_memory_blocks{use="kv"} 3.0
loraplex_memory_blocks{use="adapter"} 4.0
# TYPE loraplex_batch_size histogram
loraplex_batch_size_bucket{le="+Inf",model="m"} 4.0
loraplex_batch_size_count{model="m"} 4.0
loraplex_batch_size_sum{model="m"} 10.0
# TYPE loraplex_adapter_loads_total counter
loraplex_adapter_loads_total{result="ok"} 7.0
loraplex_adapter_loads_total{result="INTERNAL"} 1.0
"""


def test_counters() -> None:
    before, now = Counters(METRICS), Counters(METRICS.replace("10.0", "40.0").replace("4.0", "9.0"))

    assert now.value("adapter_loads_total") == 8
    assert now.value("adapter_loads_total", result="ok") == 7
    assert now.value("memory_blocks", use="adapter") == 9
    assert now.value("no_such_metric") == 0
    assert now.mean_since(before, "batch_size") == pytest.approx(30 / 5)
    assert now.mean_since(now, "batch_size") is None


def test_metrics_url_is_read_from_the_log() -> None:
    log = "INFO loading\nINFO loraplex.serve metrics on http://127.0.0.1:9464/metrics\n"

    assert metrics_url(log) == "http://127.0.0.1:9464/metrics"
    with pytest.raises(BenchmarkError, match="does not say where its metrics are"):
        metrics_url("INFO loading\n")


def test_a_command_names_what_was_set_and_leaves_the_rest_to_the_server() -> None:
    settings = ServerSettings("model", "bfloat16", 2, memory=1 << 20)
    command = settings.command(Path("store"))

    assert command[command.index("--memory") + 1] == "1048576"
    assert "--max-slots" not in command


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (Check("ratio", 1.5, 1.5), "PASS  ratio: 1.5 (at most 1.5)"),
        (Check("ratio", 1.6, 1.5), "MISS  ratio: 1.6 (at most 1.5)"),
        (Check("share", 0.9704, 0.97, at_most=False), "PASS  share: 0.9704 (at least 0.97)"),
        (Check("pauses", 1240, 2000, at_most=False), "MISS  pauses: 1240 (at least 2000)"),
    ],
)
def test_a_check_says_figure_and_limit(check: Check, text: str) -> None:
    assert str(check) == text


def test_table() -> None:
    assert table(["what", "ms"], [["a", "1"]]) == "| what | ms |\n| --- | ---: |\n| a | 1 |"
