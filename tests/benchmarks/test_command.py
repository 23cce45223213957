"""A benchmark's figures on stdout and in files, and its exit code."""

import argparse
import json
from pathlib import Path

import pytest
from child import BenchmarkError
from command import Check, Findings, build_parser, run_command


def run(benchmark: object, *argv: str) -> int:
    assert callable(benchmark)
    return run_command(build_parser("bench.py", "what it does", "examples"), benchmark, argv)


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (3.0, 1)])
def test_a_missed_limit_is_an_exit_code(
    value: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def benchmark(args: argparse.Namespace) -> Findings:
        return Findings("| table |", {"ratio": value}, [Check("ratio", value, 2.0)])

    assert run(benchmark, "--out", str(tmp_path / "out.json")) == code

    record = json.loads((tmp_path / "out.json").read_text())
    assert record["results"] == {"ratio": value}
    assert record["checks"][0]["passed"] is (code == 0)
    assert record["settings"].keys() == {"model", "dtype", "threads", "seed"}
    printed = capsys.readouterr().out
    assert printed.startswith("| table |")
    assert f"ratio: {value:g} (at most 2)" in printed


def test_what_went_wrong_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def benchmark(args: argparse.Namespace) -> Findings:
        raise BenchmarkError("the server ended too early: no memory")

    assert run(benchmark) == 1
    assert capsys.readouterr().err == "bench.py: the server ended too early: no memory\n"
