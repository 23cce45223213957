"""Launch configurations by device, and scratch memory."""

import pytest
import torch
from loraplex_kernels.gpu.launch import configs
from loraplex_kernels.gpu.workspace import Workspace


@pytest.mark.parametrize("kernel", ["attention", "lora", "nf4"])
def test_every_amd_device_takes_the_same_configurations(kernel: str) -> None:
    assert configs(kernel, "gfx1100") == configs(kernel, "gfx942") != configs(kernel, "sm_80")


def test_a_device_without_a_table_takes_the_default() -> None:
    assert configs("lora", "sm_120") == configs("lora", "default")
    assert configs("lora", "interpreter")["shrink_short"]["num_warps"] == 1


def test_scratch_memory_stays_where_it_is_until_it_is_too_small() -> None:
    workspace = Workspace(torch.device("cpu"))
    first = workspace.take("sums", (3, 50), torch.float32)
    again = workspace.take("sums", (4, 50), torch.float32)  # within the next power of two
    other = workspace.take("parts", (3, 50), torch.float32)
    assert first.shape == (3, 50)
    assert again.data_ptr() == first.data_ptr() != other.data_ptr()
    assert workspace.take("sums", (3, 50), torch.float16).data_ptr() != first.data_ptr()

    larger = workspace.take("sums", (6, 50), torch.float32)
    first.fill_(1.0)  # a graph captured before may still write there
    larger.fill_(2.0)
    assert (first == 1.0).all()
    assert workspace.take("sums", (1, 50), torch.float32).data_ptr() == larger.data_ptr()
