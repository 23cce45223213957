"""The CUDA path as a server: its kernels in Triton's interpreter, over a real socket."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex.model.config import MODULES, read_model_config

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker
    from tests.e2e.servers import ServerFactory

PROMPT_TOKENS = [504, 3575, 282, 4649]


def answers(
    serve: "ServerFactory", model: Path, adapter: Path, *options: str
) -> list[tuple[int, ...]]:
    """The base's and the adapter's three most likely tokens, one after another."""
    server = serve(f"--model={model}", "--max-slots=2", "--max-rank=16", *options)
    assert options[0].removeprefix("--device=") in server.ready
    with closing(server.client()) as client:
        client.upload_adapter("acme", adapter)
        return [
            client.complete(
                token_ids=PROMPT_TOKENS, adapter_id=name, max_tokens=3, temperature=0.0
            ).token_ids
            for name in ("", "acme")
        ]


@pytest.mark.timeout(200)
def test_the_interpreter_answers_as_the_cpu_does(
    serve: "ServerFactory", tiny_model: Path, make_adapter: "AdapterMaker"
) -> None:
    adapter = make_adapter(read_model_config(tiny_model), 4, MODULES)
    on_cpu = answers(serve, tiny_model, adapter, "--device=cpu", "--dtype=float32")
    interpreted = answers(serve, tiny_model, adapter, "--device=triton-interpret")
    assert interpreted == on_cpu
    assert on_cpu[0] != on_cpu[1], "the adapter says nothing of its own"
