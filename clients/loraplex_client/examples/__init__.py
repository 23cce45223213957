"""Four small adapters of the default model, really trained (benchmarks/train_adapters.py)."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_DESCRIPTIONS = {
    "pirate": "talks like a pirate (rank 4, all seven linears)",
    "json": "answers with one JSON object (rank 16, q and v)",
    "headline": "reports it as breaking news (rank 8, o and down)",
    "emoji": "puts every answer between emoji (rank 8, attention, rsLoRA)",
}


@dataclass(frozen=True, slots=True)
class ExampleAdapter:
    """A PEFT folder that comes with the package."""

    name: str  # also a fitting adapter_id
    description: str
    path: Path


def example_adapters() -> list[ExampleAdapter]:
    """Each of them changes the answer to any prompt in a way that is seen at once."""
    folder = Path(str(files(__name__) / "adapters"))
    return [
        ExampleAdapter(name, description, folder / name)
        for name, description in _DESCRIPTIONS.items()
    ]
