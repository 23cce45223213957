"""The stand-in for CUDA graphs refuses what a capture would, and replays nothing but the record."""

from collections.abc import Callable

import pytest
import torch
from loraplex.model.nf4 import quantize
from loraplex_kernels.nf4 import BaseWeight
from loraplex_kernels.reference import TorchOps
from torch import Tensor

from tests.server.engine.recorded_graphs import Recorder, Refused
from tests.server.engine.tiny_llama import TinyLlama

FLOATS = torch.ones(4)
INDICES = torch.zeros(4, dtype=torch.int64)
MASK = FLOATS > 0


def recorder() -> Recorder:
    return Recorder(lambda kernel, grid, *args, **meta: kernel(*args, **meta))


def double(out: Tensor, x: Tensor, factor: float = 2.0) -> None:
    out.copy_(x * factor)


REFUSED: dict[str, tuple[str, Callable[[Tensor], object]]] = {
    "item": ("waits", lambda out: out[0].item()),
    "a float": ("waits", lambda out: float(out[0])),
    "a condition": ("waits", lambda out: 1 if out[0] else 0),
    "tolist": ("waits", lambda out: out.tolist()),
    "cpu": ("waits", lambda out: out.cpu()),
    "numpy": ("waits", lambda out: out.numpy()),
    "a message": ("waits", lambda out: f"{out}"),
    "nonzero": ("waits", lambda out: out.nonzero()),
    "a mask": ("allocates|waits", lambda out: out[out > 0]),
    "writing by a mask": ("waits", lambda out: out.__setitem__(MASK, 0.0)),
    "a new tensor": ("allocates", lambda out: torch.empty(3)),
    "an intermediate": ("allocates", lambda out: out.mul_(out + 1)),
    "a conversion": ("allocates", lambda out: out.half()),
    "a copy from a list": (
        "allocates|not known",
        lambda out: out.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
    ),
    "a copy from the host": ("not known", lambda out: out.copy_(FLOATS)),
    "a resized result": ("resized", lambda out: torch.add(FLOATS, FLOATS, out=out[:0])),
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold(name: str) -> None:
    reason, work = REFUSED[name]
    out = torch.ones(4)

    def region() -> Tensor:
        work(out)
        return out

    with pytest.raises(Refused, match=reason):
        recorder().capture(region)


def test_a_grid_is_made_of_numbers() -> None:
    """A tensor's element there would be read back at each launch, and fixed at capture."""
    launcher, out = recorder(), torch.ones(4)

    def region() -> Tensor:
        launcher.launch(double, (INDICES[0],), out, FLOATS)  # type: ignore[arg-type]
        return out

    with pytest.raises(Refused, match="grid"):
        launcher.capture(region)


def test_replays_see_what_tensors_hold_and_not_what_the_host_does() -> None:
    launcher, x, out, host = recorder(), torch.ones(2), torch.zeros(2), [3.0]

    def region() -> Tensor:
        launcher.launch(double, (1,), out, x, factor=host[0])
        out.add_(x)
        return out

    captured = launcher.capture(region)
    host[0] = 5.0
    for value in (1.0, 10.0):
        x.fill_(value)
        out.fill_(torch.nan)
        captured.graph.replay()
        assert captured.logits.tolist() == [4 * value] * 2


def test_nothing_is_launched_while_it_is_captured() -> None:
    launcher, out = recorder(), torch.full((4,), torch.nan)

    def region() -> Tensor:
        launcher.launch(double, (1,), out, FLOATS)
        return out

    captured = launcher.capture(region)
    assert out.isnan().all()
    captured.graph.replay()
    assert out.tolist() == [2.0] * 4


def test_memory_that_is_gone_by_the_time_of_a_replay() -> None:
    launcher, out = recorder(), torch.zeros(4)
    inputs = [torch.ones(4)]

    def region() -> Tensor:
        launcher.launch(double, (1,), out, inputs[0])
        return out

    captured = launcher.capture(region)
    captured.graph.replay()
    inputs.clear()
    with pytest.raises(Refused, match="freed"):
        captured.graph.replay()


def test_an_op_that_may_allocate_leaves_its_result_in_the_same_place() -> None:
    """As in the graphs' own pool."""
    launcher = Recorder(lambda *_: None, may_allocate=frozenset({"aten.mm"}))
    x, out = torch.eye(2), torch.zeros(2, 2)
    captured = launcher.capture(lambda: out.copy_(torch.mm(x, x)))
    x.mul_(3)
    captured.graph.replay()
    assert torch.equal(captured.logits, 9 * torch.eye(2))


def test_a_product_by_bitsandbytes_is_one_op_that_allocates() -> None:
    """The only one in a decoder's step, where its own choice of kernel is the quickest."""
    launcher = Recorder(lambda *_: None, may_allocate=frozenset({"bitsandbytes.gemm_4bit"}))
    x, out = torch.randn(3, 128).bfloat16(), torch.empty(3, 64).bfloat16()
    weight = BaseWeight(quantize(torch.randn(64, 128)), None)

    def region() -> Tensor:
        TorchOps().base_linear(x, weight, out)
        return out

    captured = launcher.capture(region)
    assert launcher.graphs[0].names == ["bitsandbytes.gemm_4bit", "aten.copy_"]
    x.mul_(3)
    captured.graph.replay()
    replayed = out.clone()
    assert torch.equal(replayed, region())


def test_a_decoder_on_ops_that_loop_on_the_host_is_refused() -> None:
    model = TinyLlama(torch.float32, num_blocks=8, max_slots=1)
    step = model.decode_inputs().first(2)
    with pytest.raises(Refused):
        recorder().capture(
            lambda: model.decoder.forward(step, model.kv_cache, TorchOps(), model.activations)
        )
