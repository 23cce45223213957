"""What makes an environment complete, and why one is not there."""

import os
import sys
from pathlib import Path

import pytest
from peers.environments import Environment, Progress, Unavailable, run_logged, why


def nothing(stage: str, done: int, total: int) -> None:
    raise AssertionError(stage)


def test_one_that_was_made_from_this_list_is_taken_as_it_is(tmp_path: Path) -> None:
    lock = tmp_path / "peer.txt"
    lock.write_text("torch==2.13.0\n")
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "complete.txt").write_text("torch==2.13.0\n")

    Environment(folder, lock).ensure(nothing)

    assert Environment(folder, lock).python == folder / "bin" / "python"


def test_one_that_was_finished_in_another_way_is_made_anew(tmp_path: Path) -> None:
    lock, folder = tmp_path / "peer.txt", tmp_path / "peer"
    lock.write_text("")
    folder.mkdir()
    (folder / "complete.txt").write_text("with AMX")
    finished: list[str] = []

    def finish(environment: Environment, progress: Progress) -> None:
        finished.append(environment.recipe)

    for recipe in ("with AMX", "without", "without"):
        Environment(folder, lock, finish, recipe).ensure(lambda stage, done, total: None)

    assert finished == ["without"]
    assert (folder / "bin" / "python").exists()


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (["ERROR: No matching distribution found for x", "hint"], "ERROR: No matching distrib"),
        (["a", "CMake Error at x", ""], "CMake Error"),
        (["first", "last", ""], "last"),
        ([], "it does not say why"),
    ],
)
def test_the_line_that_tells_most(said: list[str], line: str) -> None:
    assert why(said).startswith(line)


def test_a_step_that_fails_is_one_line_and_a_log(tmp_path: Path) -> None:
    heard: list[str] = []
    program = "print('working'); raise SystemExit('ERROR: no such package')"
    log = tmp_path / "install.log"

    with pytest.raises(Unavailable, match=r"^pip failed: ERROR: no such package \(see .*log\)$"):
        run_logged([sys.executable, "-c", program], log, "pip", heard.append, os.environ)

    assert sorted(heard) == ["ERROR: no such package", "working"]
    assert "working" in log.read_text()
