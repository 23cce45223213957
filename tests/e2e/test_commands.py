"""The commands of a shell against a real server, and the demo from its first line to its last."""

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from loraplex.model.config import ModelConfig
from loraplex_client import Client, ServerUnreachable
from loraplex_client.examples import example_adapters

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker
    from tests.e2e.servers import ServerProcess


def loraplex(*args: str, server: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loraplex.cli", *args],
        env={**os.environ, "LORAPLEX_SERVER": server},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_an_adapter_by_command(
    server: "ServerProcess", make_adapter: "AdapterMaker", default_config: ModelConfig
) -> None:
    folder = str(make_adapter(default_config, 2))

    def run(*args: str) -> str:
        ended = loraplex(*args, server=server.target)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    assert run("adapters", "upload", "shell", folder).startswith("uploaded shell (rank 2, ")
    assert run("adapters", "upload", "shell", folder).startswith("already there: shell")
    shown = json.loads(run("adapters", "show", "shell", "--json"))
    assert (shown["adapter_id"], shown["state"]) == ("shell", "ready")
    assert "shell" in run("adapters", "list")
    prompt = ("generate", "The capital of France is", "--max-tokens=6", "--temperature=0")
    text = run(*prompt, "--adapter=shell")
    events = [json.loads(line) for line in run(*prompt, "--adapter=shell", "--json").splitlines()]
    assert "".join(e.get("text", "") for e in events).rstrip("\n") == text.rstrip("\n")
    assert run(*prompt) != text
    run("adapters", "delete", "shell")
    gone = loraplex(*prompt, "--adapter=shell", server=server.target)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert gone.stderr.startswith("loraplex: there is no adapter 'shell' (")


def test_the_demo() -> None:
    ended = loraplex("demo", "Tell me about the sea.", "--max-tokens=12")
    assert (ended.returncode, ended.stderr) == (0, "")
    for example in example_adapters():
        assert f"uploaded {example.name} in " in ended.stdout
        assert f"== {example.name} ==" in ended.stdout
    assert "== base model ==" in ended.stdout
    count = len(example_adapters())
    shared = f"One pass served up to {count + 1} requests with {count} different adapters."
    assert shared in ended.stdout
    assert ended.stdout.endswith("loraplex serve\n")
    target = re.search(r"listens on (\S+)\.", ended.stdout)
    assert target is not None
    with Client(target[1]) as client, pytest.raises(ServerUnreachable):
        client.server_info()
