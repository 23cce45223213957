"""A child's last words, and its end."""

from pathlib import Path

import pytest
from child import BenchmarkError, Child


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with (
        Child("the child", ["no_such_module"], tmp_path / "log") as child,
        pytest.raises(BenchmarkError, match=r"the child ended too early: .*no_such_module"),
    ):
        child.read()


def test_leaving_ends_a_child_that_waits(tmp_path: Path) -> None:
    with Child("python", ["code", "-q"], tmp_path / "log") as child:
        child.write("print(6 * 7)")
    with pytest.raises(ValueError, match="closed file"):
        child.read()
