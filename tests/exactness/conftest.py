"""The product's engine and transformers + PEFT, side by side on the same NF4 weights.

A module's fixtures take some gigabytes together, so none of them outlives it.
"""

import gc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from loraplex.model.checkpoint import Checkpoint
from loraplex.model.config import read_model_config
from loraplex.model.decoder import Decoder
from loraplex.model.default import ensure_default_model
from loraplex.model.linear import WeightForm
from loraplex.model.loader import LoadOptions, load_decoder
from loraplex.model.nf4_cache import NF4Cache
from loraplex.model.tokenizer import Tokenizer
from loraplex_kernels.dispatch import cpu_ops, multiplies_codes
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from torch import Tensor

from tests.exactness.cases import BF16, F32, TEXTS, Case, Folders, all_batches, all_cases
from tests.exactness.compare import Alone, Expected, Forced, PeftError, Prompts, rms
from tests.exactness.harness import CPU, Answer, Harness, Request
from tests.exactness.reference import Continuation, Reference

DecoderOf = Callable[[torch.dtype, WeightForm], Decoder]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", all_cases(), ids=lambda case: case.name)
    if "adapted" in metafunc.fixturenames:
        metafunc.parametrize("adapted", all_cases()[1:], ids=lambda case: case.name)
    if "batch" in metafunc.fixturenames:
        batches = all_batches()
        metafunc.parametrize("batch", batches, ids=[f"batch {i}" for i in range(len(batches))])


@pytest.fixture(scope="module")
def model_folder() -> Path:
    return ensure_default_model()


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    gc.collect()  # models hold themselves in circles


@pytest.fixture(scope="module")
def prompts(model_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(model_folder)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(model_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def reference(model_folder: Path, folders: Folders) -> Reference:
    return Reference(model_folder, folders)


@pytest.fixture(scope="module")
def decoder_of(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DecoderOf:
    """Quantised once, whatever the forms."""
    config, checkpoint = read_model_config(model_folder), Checkpoint(model_folder)
    codes = tmp_path_factory.mktemp("nf4")

    @cache
    def load(dtype: torch.dtype, form: WeightForm) -> Decoder:
        kept = NF4Cache(codes, "0" * 64)
        decoder = load_decoder(checkpoint, config, LoadOptions(CPU, dtype, form, kept))
        kept.save()
        return decoder

    return load


@pytest.fixture(scope="module")
def ops(native_cache: Path) -> Ops:
    return cpu_ops(native_cache)


@pytest.fixture(scope="module")
def float32(decoder_of: DecoderOf, ops: Ops, folders: Folders) -> Harness:
    return Harness(decoder_of(F32, WeightForm.DENSE), ops, folders)


@pytest.fixture(scope="module")
def bfloat16(decoder_of: DecoderOf, ops: Ops, folders: Folders) -> Harness:
    """By the form that serves on this CPU: from the 4-bit codes where it has matrix tiles."""
    form = WeightForm.PACKED if multiplies_codes(ops, BF16) else WeightForm.DENSE
    return Harness(decoder_of(BF16, form), ops, folders)


@pytest.fixture(scope="module")
def torch_ops(decoder_of: DecoderOf, folders: Folders) -> Harness:
    """In float32, with the ops in plain torch."""
    return Harness(decoder_of(F32, WeightForm.DENSE), TorchOps(), folders, num_blocks=224)


@pytest.fixture(scope="module")
def dense(decoder_of: DecoderOf, ops: Ops, folders: Folders) -> Harness:
    """In bfloat16, from the dequantised copy, layer by layer: what serves on other CPUs."""
    return Harness(decoder_of(BF16, WeightForm.DENSE), ops, folders, num_blocks=224)


@pytest.fixture(scope="module")
def alone(float32: Harness, prompts: Prompts) -> Alone:
    """What the engine says in float32 when nothing else runs."""

    @cache
    def answer(case: Case) -> Answer:
        [only], _ = float32.run([Request(case.adapter, prompts[case.text])])
        return only

    return answer


@pytest.fixture(scope="module")
def expected(reference: Reference, alone: Alone, prompts: Prompts) -> Expected:
    """What PEFT says in float32."""

    @cache
    def continuation(case: Case) -> Continuation:
        return reference.greedy(case.adapter, prompts[case.text], alone(case).tokens)

    return continuation


@pytest.fixture(scope="module")
def of_base(reference: Reference, prompts: Prompts) -> Callable[[int], Tensor]:
    """The base's logits for one of the prompts."""
    return cache(lambda text: reference.logits(None, prompts[text]))


@pytest.fixture(scope="module")
def forced(expected: Expected, prompts: Prompts) -> Forced:
    """A request that takes the tokens PEFT says in float32."""

    def request(case: Case) -> Request:
        return Request(case.adapter, prompts[case.text], expected(case).tokens)

    return request


@pytest.fixture(scope="module")
def peft_error(reference: Reference, expected: Expected, forced: Forced) -> PeftError:
    """RMS error of PEFT's logits with a bf16 base."""

    @cache
    def measure(case: Case) -> float:
        tokens = [*forced(case).prompt, *expected(case).tokens[:-1]]
        return rms(reference.logits(case.adapter, tokens, BF16) - expected(case).logits)

    return measure
