"""What a checkpoint's generation_config.json says: stop tokens and sampling defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.engine.sequence import SamplingParams
from loraplex.errors import ModelError
from loraplex.model.config import read_json


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """For requests that do not say otherwise."""

    eos_token_ids: frozenset[int]
    sampling: SamplingParams


def read_generation_defaults(folder: Path) -> GenerationDefaults:
    """generation_config.json where there is one, else config.json for the stop tokens alone."""
    path = folder / "generation_config.json"
    raw = read_json(path) if path.exists() else {}
    config = read_json(folder / "config.json")
    eos = raw.get("eos_token_id", config.get("eos_token_id"))
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise ModelError(f"{folder}: eos_token_id is {eos!r}, not token ids")
    vocab_size = config.get("vocab_size", 0)  # an id beyond it is never drawn
    sampling = SamplingParams(
        temperature=_number(raw, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(raw, "top_p", 1.0, 1e-6, 1.0),
        top_k=int(_number(raw, "top_k", 0, 0, 1 << 31)),
        min_p=_number(raw, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=_number(raw, "repetition_penalty", 1.0, 1e-6, 1e6),
    )
    return GenerationDefaults(frozenset(i for i in ids if 0 <= i < vocab_size), sampling)


def _number(
    raw: Mapping[str, Any], key: str, default: float, lowest: float, highest: float
) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"generation_config.json: {key} is {value!r}, not a number")
    if not lowest <= value <= highest:
        raise ModelError(
            f"generation_config.json: {key} is {value!r}, not from {lowest:g} to {highest:g}"
        )
    return float(value)
