"""A server that cannot start: exit code 1, one clear line, and nothing left running."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.e2e.servers import ServerProcess

# Flags, and what the line must say. In braces: a model that could be served, one that could not,
# and what another server has.
CASES: Mapping[str, tuple[list[str], str]] = {
    "no model": (["--model=/no/such/folder"], "/no/such/folder: no such folder"),
    "unsupported model": (["--model={gpt2}"], "GPT2LMHeadModel is not supported"),
    "empty folder": (["--model={empty}"], "config.json is missing"),
    "float32 on a GPU": (["--model={tiny}", "--device=cuda", "--dtype=float32"], "--device c"),
    "long context": (["--model={tiny}", "--context-length=9000"], "--context-length 9000"),
    "little memory": (["--model={tiny}", "--memory=1K"], "--memory 1.0 KiB is too small"),
    "much memory": (["--model={tiny}", "--memory=900T"], "--memory 900 TiB cannot be had"),
    "port": (["--model={tiny}", "--listen={listen}"], "cannot listen on {listen}"),
    "metrics port": (
        ["--model={tiny}", "--metrics={metrics}"],
        "cannot serve metrics on {metrics}",
    ),
    "other machines": (["--model={tiny}", "--listen=0.0.0.0:0"], "--insecure"),
    "half of TLS": (["--model={tiny}", "--tls-cert={tiny}/config.json"], "--tls-key"),
    "no TLS file": (
        ["--model={tiny}", "--tls-cert=/none", "--tls-key=/none"],
        "--tls-key /none: No such",
    ),
    "store in use": (["--model={tiny}", "--store={store}"], "in use by another server (--store"),
    "store is a file": (["--model={tiny}", "--store={tiny}/config.json"], "adapter store"),
    "step log": (["--model={tiny}", "--step-log=/no/such/log"], "/no/such/log: No such file"),
}

# One process for all of them: most of a start is importing torch.
EACH = """
import json, sys, threading
from loraplex.cli import main
for name, flags in json.load(sys.stdin).items():
    code = main(["serve", *flags])
    assert not [t for t in threading.enumerate() if t.name.startswith("loraplex")]
    print(json.dumps({"case": name, "code": code}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def said(
    server: "ServerProcess", tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, list[str]]]:
    """By case: the exit code, and stderr's lines without the log's."""
    folder = tmp_path_factory.mktemp("refused")
    common = ["--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", f"--store={folder}/store"]
    common += ["--device=cpu", "--threads=1", "--memory=64M", "--log-level=warning"]
    facts = facts_of(server, tiny_model, folder)
    cases = {
        name: [*common, *(flag.format_map(facts) for flag in flags)]
        for name, (flags, _) in CASES.items()
    }
    run = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(cases), capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    found: dict[str, tuple[int, list[str]]] = {}
    lines: list[str] = []
    for line in run.stderr.splitlines():
        if line.startswith('{"case"'):
            ended = json.loads(line)
            found[ended["case"]] = (ended["code"], lines)
            lines = []
        else:
            lines.append(line)
    return found


def facts_of(server: "ServerProcess", tiny_model: Path, folder: Path) -> dict[str, str]:
    gpt2, empty = folder / "gpt2", folder / "empty"
    empty.mkdir()
    gpt2.mkdir()
    (gpt2 / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    return {
        "tiny": str(tiny_model),
        "gpt2": str(gpt2),
        "empty": str(empty),
        "listen": server.target,
        "metrics": server.metrics_url.removeprefix("http://").removesuffix("/metrics"),
        "store": str(server.store),
    }


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_why(
    case: str,
    said: dict[str, tuple[int, list[str]]],
    server: "ServerProcess",
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    code, lines = said[case]
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("loraplex: ")
    assert "unexpected" not in lines[0]
    assert CASES[case][1].format_map(facts_of(server, tiny_model, tmp_path)) in lines[0]
