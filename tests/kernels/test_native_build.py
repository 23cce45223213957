"""The compiled ops are built once, and whatever goes wrong leaves a server that works."""

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_kernels.dispatch import cpu_ops
from loraplex_kernels.native import BuildError, build, is_built, load_library

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))

# Chooses ops in a process of its own, as which compiler there is comes from its PATH.
CHOOSE = """
import logging, os, sys
from pathlib import Path
import torch
from loraplex_kernels.dispatch import cpu_ops
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
os.environ["PATH"] = sys.argv[1]
print(cpu_ops(Path(sys.argv[2])).name)
"""

# One function a part: what is linked has both.
SMALL_SOURCE = """
#ifdef LORAPLEX_BF16
extern "C" int first() { return 1; }
#else
extern "C" int second() { return 2; }
#endif
"""


def choose(path: Path, cache: Path) -> list[str]:
    command = [sys.executable, "-c", CHOOSE, str(path), str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_without_a_compiler_the_ops_are_torchs(tmp_path: Path) -> None:
    warning = "WARNING the CPU ops run in plain torch, which is slower: no C++ compiler found"
    assert choose(tmp_path, tmp_path / "cache") == [warning, "torch"]


def test_a_compiler_that_refuses_is_quoted_in_one_line(tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'no such -march' >&2\necho more >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    warning, name = choose(compiler.parent, cache)
    assert warning.endswith("slower: c++ failed: no such -march")
    assert name == "torch"
    assert list(cache.iterdir()) == []


def test_a_compiler_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 1000 &\nwait\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:/usr/bin:/bin")
    monkeypatch.setattr(build, "SECONDS", 0.1)
    assert not is_built(tmp_path / "cache")
    with pytest.raises(BuildError, match=r"c\+\+ did not end within 0 seconds"):
        load_library(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


if HAS_COMPILER:

    def test_builds_once_and_leaves_nothing_else(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = tmp_path / "ops.cpp"
        source.write_text(SMALL_SOURCE)
        monkeypatch.setattr(build, "SOURCE", source)
        cache = tmp_path / "cache"
        assert not is_built(cache)
        library = load_library(cache)
        assert (library.first(), library.second()) == (1, 2)
        assert is_built(cache)
        built = Path(library._name)
        assert list(cache.iterdir()) == [built]
        before = built.stat()
        assert load_library(cache)._name == library._name
        assert list(cache.iterdir()) == [built]
        assert built.stat().st_mtime_ns == before.st_mtime_ns

    def test_the_ops_that_were_built_are_chosen(native_library: ctypes.CDLL) -> None:
        cache = Path(native_library._name).parent
        assert is_built(cache)
        assert load_library(cache)._name == native_library._name
        assert cpu_ops(cache).name == "native"

    def test_a_damaged_library_falls_back(
        native_library: ctypes.CDLL, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / Path(native_library._name).name).write_bytes(b"not a library")
        with pytest.raises(BuildError, match="cannot be kept or loaded"):
            load_library(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert cpu_ops(tmp_path).name == "torch"
        assert "slower: the compiled ops cannot be kept or loaded" in caplog.text
