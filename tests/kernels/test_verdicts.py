"""A verdict is found out once for each of what it depends on, and never half-written."""

import json
import logging
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from loraplex_kernels.cases import Case, ModelShapes, Prepared
from loraplex_kernels.check import Outcome, failed_outcome
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.verdicts import (
    FOLDER,
    Environment,
    VerdictKey,
    failed_kernels,
    hash_of_sources,
    is_conclusive,
    load_verdict,
    save_verdict,
)

ENVIRONMENT = Environment("abc", "3.9.0", "2.13.0", "0.50.2", "NVIDIA H100", "9.0", "550.54")
KEY = VerdictKey(
    ENVIRONMENT, ModelShapes("llama", 4096, 14336, 32, 8, 128, 32), "torch.bfloat16", 64
)


def make(form: GranuleForm) -> Prepared:
    raise AssertionError


FAILED = failed_outcome(Case("attention", "prefill", 512, 1, make), "off by 3e-01")
PASSED = replace(FAILED, kernel="lora", failure=None, error=1e-3)
SHORT = replace(FAILED, is_lasting=False)


class Checker:
    """Counts how often it is asked."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.calls = 0
        self._outcomes = outcomes

    def __call__(self) -> Iterator[Outcome]:
        self.calls += 1
        return iter(self._outcomes)


def test_the_second_time_the_cache_answers(tmp_path: Path) -> None:
    check = Checker(PASSED, FAILED, replace(FAILED, failure="later"))
    for _ in range(2):
        found = failed_kernels(KEY, tmp_path / "new", check)
        assert found == {"attention": "off by 3e-01 (prefill, 512 rows)"}
    assert check.calls == 1


def test_what_is_stored_says_what_it_is_for(tmp_path: Path) -> None:
    save_verdict(KEY, tmp_path, [PASSED, FAILED])
    (path,) = (tmp_path / FOLDER).iterdir()
    stored = json.loads(path.read_text())
    assert stored["passed"] == ["lora"]
    assert stored["for"]["environment"]["device"] == "NVIDIA H100"


OTHERS = {
    **{
        field.name: replace(KEY, environment=replace(ENVIRONMENT, **{field.name: "other"}))
        for field in fields(Environment)
    },
    "hidden_size": replace(KEY, shapes=replace(KEY.shapes, hidden_size=7)),
    "intermediate_size": replace(KEY, shapes=replace(KEY.shapes, intermediate_size=7)),
    "num_heads": replace(KEY, shapes=replace(KEY.shapes, num_heads=7)),
    "num_kv_heads": replace(KEY, shapes=replace(KEY.shapes, num_kv_heads=7)),
    "head_dim": replace(KEY, shapes=replace(KEY.shapes, head_dim=7)),
    "num_layers": replace(KEY, shapes=replace(KEY.shapes, num_layers=7)),
    "block_tokens": replace(KEY, shapes=replace(KEY.shapes, block_tokens=48)),
    "dtype": replace(KEY, dtype="torch.float16"),
    "max_rank": replace(KEY, max_rank=32),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_anything_else_is_checked_anew(tmp_path: Path, other: VerdictKey) -> None:
    save_verdict(KEY, tmp_path, [PASSED, FAILED])
    check = Checker(PASSED)
    assert failed_kernels(other, tmp_path, check) == {}
    assert check.calls == 1


def test_a_model_of_the_same_shapes_needs_no_other_check(tmp_path: Path) -> None:
    save_verdict(KEY, tmp_path, [PASSED, FAILED])
    tuned = replace(KEY, shapes=replace(KEY.shapes, name="tuned"))
    assert load_verdict(tuned, tmp_path) is not None


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"null", b"[]", b"{}"),
        b'{"format": 2, "failed": {}}',
        b'{"format": 1}',
        b'{"format": 1, "failed": []}',
    ],
)
def test_a_file_that_cannot_be_read_is_as_none(tmp_path: Path, content: bytes) -> None:
    save_verdict(KEY, tmp_path, [PASSED, FAILED])
    (path,) = (tmp_path / FOLDER).iterdir()
    path.write_bytes(content)
    check = Checker(PASSED)
    assert failed_kernels(KEY, tmp_path, check) == {}
    assert check.calls == 1
    assert load_verdict(KEY, tmp_path) == {}


def test_for_want_of_memory_nothing_is_stored(tmp_path: Path) -> None:
    check = Checker(PASSED, SHORT)
    for _ in range(2):
        assert list(failed_kernels(KEY, tmp_path, check)) == ["attention"]
    assert check.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_where_every_kernel_failed_nothing_is_stored(tmp_path: Path) -> None:
    """As without a C compiler, which may be installed tomorrow."""
    check = Checker(FAILED, replace(PASSED, failure="RuntimeError: Failed to find C compiler"))
    for _ in range(2):
        assert set(failed_kernels(KEY, tmp_path, check)) == {"attention", "lora"}
    assert check.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_fails_only_some_cases_has_failed() -> None:
    again = replace(FAILED, failure=None)
    assert is_conclusive([PASSED, FAILED, again])
    assert not is_conclusive([FAILED, again])
    assert not is_conclusive([PASSED, SHORT])
    assert is_conclusive([PASSED])


def test_a_cache_that_cannot_be_written_is_only_slow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = failed_kernels(KEY, tmp_path / "file", Checker(PASSED, FAILED))
    assert list(found) == ["attention"]
    assert "cannot be written" in caplog.text


def test_the_environment_of_a_cpu() -> None:
    here = Environment.of(torch.device("cpu"))
    assert here.bitsandbytes_version == version("bitsandbytes")
    assert (here.device, here.driver) == ("cpu", "")
    assert here.torch_version == torch.__version__
    assert here.sources == hash_of_sources()
