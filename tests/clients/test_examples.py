"""The example adapters are there, small, in bf16, and what PEFT loads."""

import json
import subprocess
import sys

import pytest
import torch
from loraplex_client.examples import ExampleAdapter, example_adapters
from peft import LoraConfig
from safetensors import safe_open

MEGABYTE = 1_000_000


def test_there_are_four_of_different_shapes() -> None:
    adapters = example_adapters()
    assert [adapter.name for adapter in adapters] == ["pirate", "json", "headline", "emoji"]
    configs = [LoraConfig.from_pretrained(str(adapter.path)) for adapter in adapters]
    assert {config.r for config in configs} == {4, 8, 16}
    assert {len(config.target_modules) for config in configs} == {2, 4, 7}
    assert any(config.use_rslora and config.alpha_pattern for config in configs)
    assert sum(file.stat().st_size for a in adapters for file in a.path.iterdir()) < 10 * MEGABYTE


@pytest.mark.parametrize("adapter", example_adapters(), ids=lambda adapter: adapter.name)
def test_an_adapter_is_an_ordinary_peft_folder(adapter: ExampleAdapter) -> None:
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m-instruct"
    assert sorted(config["target_modules"]) == config["target_modules"]
    weights = adapter.path / "adapter_model.safetensors"
    assert weights.stat().st_size <= 2.5 * MEGABYTE
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(tensors) == 30 * len(config["target_modules"]) * 2
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.isfinite().all()
        assert tensor.abs().max() > 0
        assert config["r"] == tensor.shape["lora_B" in name]


def test_listing_them_imports_nothing_heavy() -> None:
    code = (
        "import sys; from loraplex_client.examples import example_adapters; example_adapters(); "
        "print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
