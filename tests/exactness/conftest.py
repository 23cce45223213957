"""The product's engine and transformers + PEFT, side by side on the same NF4 weights."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import read_model_config
from loraplex.model.default import ensure_default_model
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex.model.tokenizer import Tokenizer
from loraplex_kernels.dispatch import choose_ops
from loraplex_kernels.reference import TorchOps

from tests.exactness.cases import BF16, F32, TEXTS, Case, Folders, all_batches, all_cases
from tests.exactness.harness import CPU, Answer, Harness, Request
from tests.exactness.reference import Continuation, Reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", all_cases(), ids=lambda case: case.name)
    if "adapted" in metafunc.fixturenames:
        metafunc.parametrize("adapted", all_cases()[1:], ids=lambda case: case.name)
    if "batch" in metafunc.fixturenames:
        batches = all_batches()
        metafunc.parametrize("batch", batches, ids=[f"batch {i}" for i in range(len(batches))])


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prompts(model_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(model_folder)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="session")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(model_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def reference(model_folder: Path, folders: Folders) -> Reference:
    return Reference(model_folder, folders)


@pytest.fixture(scope="session")
def harness_of(
    model_folder: Path, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[torch.dtype], Harness]:
    ops = choose_ops(CPU, tmp_path_factory.mktemp("native"))

    def build(dtype: torch.dtype) -> Harness:
        options = LoadOptions(CPU, dtype, WeightForm.DENSE)
        config = read_model_config(model_folder)
        return Harness(load_decoder(Checkpoint(model_folder), config, options), ops, folders)

    return build


@pytest.fixture(scope="session")
def float32(harness_of: Callable[[torch.dtype], Harness]) -> Harness:
    return harness_of(F32)


@pytest.fixture(scope="session")
def bfloat16(harness_of: Callable[[torch.dtype], Harness]) -> Harness:
    return harness_of(BF16)


@pytest.fixture(scope="session")
def torch_ops(float32: Harness) -> Harness:
    """In float32, with the ops in plain torch."""
    return float32.with_ops(TorchOps())


@pytest.fixture(scope="session")
def alone(float32: Harness, prompts: list[list[int]]) -> Callable[[Case], Answer]:
    """What the engine says in float32 when nothing else runs."""

    @cache
    def answer(case: Case) -> Answer:
        [only], _ = float32.run([Request(case.adapter, prompts[case.text])])
        return only

    return answer


@pytest.fixture(scope="session")
def expected(
    reference: Reference, alone: Callable[[Case], Answer], prompts: list[list[int]]
) -> Callable[[Case], Continuation]:
    """What PEFT says in float32."""

    @cache
    def continuation(case: Case) -> Continuation:
        return reference.greedy(case.adapter, prompts[case.text], alone(case).tokens)

    return continuation
