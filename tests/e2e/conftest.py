"""Servers for the end-to-end tests, and adapters and a model for them."""

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
from loraplex.config import DEFAULT_MODEL, cache_dir
from loraplex.model.config import ModelConfig, linear_prefix, read_model_config
from loraplex_client import Client
from safetensors.numpy import save_file

from tests.e2e.random_llama import write_model
from tests.e2e.servers import ServerFactory, ServerProcess, check_store


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is told with what the test's servers wrote to stderr."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            servers = value.servers if isinstance(value, ServerFactory) else [value]
            for server in servers:
                if isinstance(server, ServerProcess):
                    report.sections.append((f"{server.stderr}", server.log()[-8000:]))
    return report


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServerFactory]:
    """For tests that need servers of their own."""
    with closing(ServerFactory(tmp_path)) as factory:
        yield factory


def shared(folder: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server for many tests; when they are through, nothing may be left of them."""
    with closing(ServerFactory(folder)) as factory:
        server = factory("--log-level=debug", *flags)
        yield server
        server.eventually(server.is_idle)
        check_store(server.store)
        assert "Traceback" not in server.log()
        assert " ERROR " not in server.log()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The embedded model as it is served by default, in bfloat16."""
    yield from shared(tmp_path_factory.mktemp("bfloat16"))


@pytest.fixture(scope="session")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The embedded model in float32, where a batch changes nothing."""
    yield from shared(tmp_path_factory.mktemp("float32"), "--dtype=float32")


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def default_config(server: ServerProcess) -> ModelConfig:
    """The embedded model's; its folder is there once a server has started."""
    return read_model_config(cache_dir() / "models" / DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_model(default_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers under the embedded model's tokenizer: it starts and steps quickly."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        copy(cache_dir() / "models" / DEFAULT_MODEL / name, folder)
    write_model(folder, default_config.vocab_size)
    return folder


class AdapterMaker:
    """Writes PEFT folders; what an adapter says differs from the base and from every other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def __call__(
        self, base: ModelConfig, rank: int = 4, modules: Sequence[str] = ("q_proj", "v_proj")
    ) -> Path:
        self._made += 1
        folder = self._folder / f"adapter{self._made}"
        folder.mkdir()
        rng = np.random.default_rng(self._made)
        tensors: dict[str, Any] = {}
        for linear in base.linears():
            if linear.module in modules:
                path = f"base_model.model.{linear_prefix(linear.layer, linear.module)}"
                a = rng.standard_normal((rank, linear.in_features)) / linear.in_features**0.5
                b = rng.standard_normal((linear.out_features, rank)) * (0.7 / rank**0.5)
                tensors[f"{path}.{linear.module}.lora_A.weight"] = a.astype(np.float32)
                tensors[f"{path}.{linear.module}.lora_B.weight"] = b.astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        config |= {"task_type": "CAUSAL_LM", "target_modules": list(modules)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterMaker:
    return AdapterMaker(tmp_path_factory.mktemp("adapters"))
