"""The command line of `loraplex`, as far as it goes without a server."""

import subprocess
import sys
from pathlib import Path

import pytest
from loraplex.cli import _serve_config, build_parser, main
from loraplex.config import Address, ServeConfig, cache_dir, data_dir
from loraplex_client.cli_options import UsageError

COMMANDS = (
    "",
    "serve",
    "demo",
    "check",
    "generate",
    "chat",
    "adapters",
    *(f"adapters {action}" for action in ("upload", "list", "show", "delete", "pin", "unpin")),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {' '.join(['loraplex', *command.split()])} ")
    assert err == ""


def test_every_command_is_on_the_first_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out, _ = capsys.readouterr()
    for command in ("serve", "demo", "check", "generate", "chat", "adapters"):
        assert f"\n    {command} " in out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("loraplex 0.")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("serve --frobnicate", "unrecognized arguments: --frobnicate"),
        ("serve extra", "unrecognized arguments: extra"),
        ("serve --device tpu", "invalid choice: 'tpu'"),
        ("serve --dtype int8", "invalid choice: 'int8'"),
        ("serve --listen 50051", "'50051' is not HOST:PORT"),
        ("serve --listen 127.0.0.1:70000", "'127.0.0.1:70000' is not HOST:PORT"),
        ("serve --metrics on", "'on' is not HOST:PORT"),
        ("serve --memory lots", "'lots' is not a size such as 512M or 2G"),
        ("serve --host-memory -1", "'-1' is not a size such as 512M or 2G"),
        ("serve --max-adapter-size -1", "'-1' is not a size such as 512M or 2G"),
        ("serve --max-rank 0", "'0' is not a positive number"),
        ("serve --max-running 1.5", "'1.5' is not a positive number"),
        ("serve --threads -2", "'-2' is not a positive number"),
        ("serve --drain soon", "invalid float value: 'soon'"),
        ("serve --log-level loud", "invalid choice: 'loud'"),
        ("check --device tpu", "invalid choice: 'tpu'"),
        ("check --max-rank 0", "'0' is not a positive number"),
        ("demo --max-tokens 0", "'0' is not a positive number"),
    ],
)
def test_a_command_line_that_cannot_be_meant(
    line: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err.splitlines()[-1]


def config(*flags: str) -> ServeConfig:
    return _serve_config(build_parser().parse_args(["serve", *flags]))


def test_serve_without_flags_is_the_default() -> None:
    assert config() == ServeConfig(store=data_dir() / "store", cache=cache_dir())


def test_every_flag_of_serve_arrives() -> None:
    flags = {
        "--model": "some/model",
        "--device": "cpu",
        "--dtype": "float32",
        "--context-length": "4096",
        "--store": "/s",
        "--listen": "[::1]:0",
        "--metrics": "off",
        "--tls-cert": "/c",
        "--tls-key": "/k",
        "--memory": "1.5G",
        "--host-memory": "0",
        "--max-rank": "32",
        "--max-slots": "3",
        "--max-running": "4",
        "--max-waiting": "5",
        "--max-step-tokens": "6",
        "--max-adapter-size": "7M",
        "--threads": "8",
        "--drain": "0.5",
        "--step-log": "/l",
    }
    pairs = [text for pair in flags.items() for text in pair]
    assert config(*pairs, "--insecure") == ServeConfig(
        store=Path("/s"),
        cache=cache_dir(),
        model="some/model",
        device="cpu",
        dtype="float32",
        listen=Address("::1", 0),
        metrics=None,
        insecure=True,
        tls_cert=Path("/c"),
        tls_key=Path("/k"),
        max_rank=32,
        max_slots=3,
        memory=3 << 29,
        host_memory=0,
        max_running=4,
        max_waiting=5,
        max_step_tokens=6,
        max_adapter_bytes=7 << 20,
        context_length=4096,
        threads=8,
        step_log=Path("/l"),
        drain_seconds=0.5,
    )


def test_a_step_has_room_for_all_that_decode() -> None:
    config("--max-step-tokens=16", "--max-running=16")
    with pytest.raises(UsageError, match="--max-step-tokens must be at least --max-running"):
        config("--max-step-tokens=15", "--max-running=16")


def test_the_command_line_itself_is_light() -> None:
    code = "import sys, loraplex.cli; print({'torch', 'rich', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
