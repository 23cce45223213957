"""Generated adapters are what the server takes for a PEFT adapter."""

from pathlib import Path

from adapter_files import write_adapter, write_variant
from loraplex.adapters.peft import CONFIG_NAME, BaseLinear, read_adapter, read_config
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.model.config import LinearShape, linear_prefix

LINEARS = [
    LinearShape(f"{linear_prefix(layer, module)}.{module}", layer, module, 12, 8)
    for layer in range(2)
    for module in ("q_proj", "down_proj")
]


def test_read_back_with_every_linear_and_the_rank(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", LINEARS, rank=4, seed=1)

    config = read_config((tmp_path / "a" / "adapter_config.json").read_text(), max_rank=4)
    linears = {linear.name: BaseLinear(*linear) for linear in LINEARS}
    spec = read_adapter(tmp_path / "a" / "adapter_model.safetensors", config, linears, max_rank=4)

    assert {(module.base.name, module.rank, module.scale) for module in spec.modules} == {
        (linear.name, 4, 1.0) for linear in LINEARS
    }


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        write_adapter(tmp_path / name, LINEARS, rank=4, seed=seed)
        return (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_variants_differ_in_a_few_finite_weights(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", LINEARS, rank=4, seed=1)
    variants = [tmp_path / f"v{number}" for number in (1, 2, 64)]
    for number, folder in zip((1, 2, 64), variants, strict=True):
        write_variant(folder, tmp_path / "a", number)

    contents = {(folder / WEIGHTS_NAME).read_bytes() for folder in variants}
    assert len(contents) == 3
    config = read_config((variants[0] / CONFIG_NAME).read_text(), max_rank=4)
    linears = {linear.name: BaseLinear(*linear) for linear in LINEARS}
    for folder in variants:
        read_adapter(folder / WEIGHTS_NAME, config, linears, max_rank=4)
