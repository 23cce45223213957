"""A checkpoint's own sampling defaults: read, bounded, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from loraplex.engine.sequence import SamplingParams
from loraplex.errors import ModelError
from loraplex.model.generation import read_generation_defaults


def save(folder: Path, generation: dict[str, Any] | None, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_what_is_said_is_taken(tmp_path: Path) -> None:
    said = {"eos_token_id": [2, 7, 100], "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    defaults = read_generation_defaults(save(tmp_path, said, eos_token_id=3))
    assert defaults.eos_token_ids == {2, 7}  # 100 is beyond the vocabulary
    assert defaults.sampling == SamplingParams(temperature=0.6, top_p=0.9, top_k=50)


@pytest.mark.parametrize("generation", [None, {}, {"temperature": None}])
def test_what_is_not_said_is_neutral(tmp_path: Path, generation: dict[str, Any] | None) -> None:
    defaults = read_generation_defaults(save(tmp_path, generation, eos_token_id=3))
    assert defaults.eos_token_ids == {3}
    assert defaults.sampling == SamplingParams()


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"temperature": "hot"},
        {"top_p": float("nan")},
        {"eos_token_id": "</s>"},
    ],
)
def test_what_would_fail_a_step_is_refused_by_name(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(said))):
        read_generation_defaults(save(tmp_path, said))
