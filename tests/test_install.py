"""The wheel: what is in it, and that without extras it is a light client and nothing more."""

import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from loraplex_client.examples import example_adapters

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "loraplex": "server",
    "loraplex_kernels": "kernels",
    "loraplex_client": "clients",
    "loraplex_protos": "protos",
}

Bare = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """Runs a command of a fresh environment that has the wheel, and no extras."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", symlinks=True)
    programs = folder / "venv/bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "-q"]
    pip += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LORAPLEX"))}

    def run(program: str, *args: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(programs / program), *args],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def source_files() -> set[str]:
    """Everything the packages' folders hold, by its path in the wheel."""
    roots = [(ROOT / folder, package) for package, folder in PACKAGES.items()]
    files = [(root, path) for root, package in roots for path in (root / package).rglob("*")]
    return {
        path.relative_to(root).as_posix()
        for root, path in files
        if path.is_file() and path.parent.name != "__pycache__" and path.suffix != ".so"
    }


def test_the_wheel_holds_the_packages_whole(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "loraplex_kernels/native/ops.cpp" in names
    for proto in ("inference", "adapters"):
        for suffix in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert f"loraplex_protos/v1/{proto}{suffix}" in names
    for adapter in example_adapters():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert f"loraplex_client/examples/adapters/{adapter.name}/{name}" in names


def test_only_what_the_client_imports_is_required(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
        (scripts,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "loraplex = loraplex.cli:main" in archive.read(scripts).decode()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    required = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split("[<>]", line)[0] for line in required} == {
        "googleapis-common-protos",
        "grpcio",
        "grpcio-status",
        "protobuf",
        "rich",
    }
    assert {"server", "test", "dev"} <= set(fields.get_all("Provides-Extra", []))
    assert fields["Requires-Python"] == ">=3.11"


def test_without_extras_there_is_no_torch(bare: Bare) -> None:
    code = (
        "from importlib.util import find_spec; import loraplex_client, loraplex.cli; "
        "print([m for m in ('torch', 'numpy', 'safetensors', 'transformers') if find_spec(m)])"
    )
    ended = bare("python", "-c", code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("command", [(), ("generate",), ("adapters", "upload"), ("serve",)])
def test_without_extras_help_is_there(command: tuple[str, ...], bare: Bare) -> None:
    ended = bare("loraplex", *command, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"usage: {' '.join(['loraplex', *command])} ")


def test_without_extras_the_client_works(bare: Bare) -> None:
    ended = bare("loraplex", "generate", "hello", "--server", "127.0.0.1:1")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("loraplex: no server at 127.0.0.1:1 ")


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_without_extras_a_server_names_the_missing_one(command: str, bare: Bare) -> None:
    ended = bare("loraplex", command)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("loraplex: this command runs a server, which needs ")
    assert ended.stderr.endswith(": pip install '.[server]' in the clone of Loraplex\n")
