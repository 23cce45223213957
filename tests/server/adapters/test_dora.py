"""The output scale is PEFT's magnitude over its weight norm, however the base is held."""

import pytest
import torch
from loraplex.adapters.dora import CHUNK_ELEMENTS, output_scale
from peft.tuners.lora.dora import DoraLinearLayer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (5, CHUNK_ELEMENTS // 2)])
def test_output_scale(dtype: torch.dtype, rows: int, columns: int) -> None:
    """In one chunk and in several, the last one short."""
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base, a, b = drawn(rows, columns).to(dtype), drawn(3, columns), drawn(rows, 3)
    magnitude = drawn(rows).abs()
    scale = output_scale(base, a.half(), b, 0.7, magnitude)
    layer = DoraLinearLayer(fan_in_fan_out=False)
    norm = layer.get_weight_norm(base.float(), b @ a.half().float(), scaling=0.7)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale, magnitude / norm, rtol=2e-6, atol=0)
