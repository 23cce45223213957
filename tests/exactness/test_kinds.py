"""Every kind of adapter and blends of them, alone and mixed, on tiny bases with and without ties.

The bases have what the default model has not: biases, which DoRA must not scale, and a head of its
own. The vocabulary's matrices are cut into many pieces.
"""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.exactness.cases import (
    BF16,
    F16,
    F32,
    Blend,
    Case,
    Folders,
    Generated,
    of_rank,
    on,
    tiny_config,
)
from tests.exactness.compare import (
    Alone,
    Expected,
    Forced,
    PeftError,
    Prompts,
    compare_bfloat16,
    compare_float32,
    relative_error,
)
from tests.exactness.harness import Harness, Request

VOCAB = 2000
TOLERANCE = 1e-5
"""Of max |logit| in float32; 1e-6 was measured."""

VOCABULARY = ["embed_tokens", "lm_head"]
INVOCATION = [5, 6, 7]  # twice in each of the prompts
ACTIVATED = {"r": 8, "lora_alpha": 16, "alora_invocation_tokens": INVOCATION}
DORA_WITH_PATTERNS = {
    "r": 4,
    "lora_alpha": 8,
    "use_dora": True,
    "use_rslora": True,
    "rank_pattern": {"layers.1.self_attn.q_proj": 20},
    "alpha_pattern": {"down_proj": 3},
    "target_modules": ["q_proj", "down_proj"],
}
GENERATED = {
    "plain": of_rank(8, F32),
    "DoRA": Generated(F32, config={"r": 12, "lora_alpha": 16, "use_dora": True}),
    "DoRA, patterns": Generated(BF16, config=DORA_WITH_PATTERNS),
    "head": on(["lm_head"], 8, F16, 0.5),
    "embedding": on(["embed_tokens"], 40, F32, 0.5),
    "vocabulary": on([*VOCABULARY, "v_proj"], 17, BF16, 0.5),
    "activated": Generated(F32, 0.3, ACTIVATED),
    "activated head": Generated(F32, 0.5, ACTIVATED | {"target_modules": ["q_proj", "lm_head"]}),
}
BLENDS = {
    "two": Blend((("plain", 0.7), ("vocabulary", -0.4))),
    "three": Blend((("head", 0.5), ("embedding", 1.5), ("vocabulary", 0.3))),
}
KINDS = [Case(name, name, index) for index, name in enumerate(GENERATED)]
BLENDED = [
    Case(f"blend of {name}", blend, index) for index, (name, blend) in enumerate(BLENDS.items())
]
BASE = Case("base", None, 0)
MIXTURES = {  # each within the slots there are, the blends' members included
    "kinds": [*KINDS[1:], BASE],
    "blends": [KINDS[1], *BLENDED, KINDS[0], BASE],
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tied = request.param == "tied"
    model = LlamaForCausalLM(
        tiny_config(VOCAB, attention_bias=not tied, mlp_bias=not tied, tie_word_embeddings=tied)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(model_folder, tmp_path_factory.mktemp("adapters"), GENERATED)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """One a kind, of several lengths."""
    generator = torch.Generator().manual_seed(1)

    def drawn(count: int) -> list[int]:
        return torch.randint(8, VOCAB, (count,), generator=generator).tolist()

    return [
        [*drawn(3), *INVOCATION, *drawn(4 + length), *INVOCATION, *drawn(5)]
        for length in range(len(GENERATED))
    ]


@pytest.mark.parametrize("kind", [*KINDS, *BLENDED], ids=lambda case: case.name)
def test_alone(kind: Case, alone: Alone, expected: Expected) -> None:
    """Its effect is there to be seen, and an activated adapter's from its start on."""
    compare_float32(kind, alone(kind), expected(kind), TOLERANCE)
    base = expected(Case("base", None, kind.text))
    prompt = len(base.logits) + 1 - len(base.tokens)
    changed = (expected(kind).logits[:prompt] - base.logits[:prompt]).abs().amax(-1)
    start = prompt - 8 if "activated" in kind.name else 0
    assert float(changed[start:].min()) > 0
    assert not changed[:start].any()
    assert relative_error(expected(kind).logits[:prompt], base.logits[:prompt]) > 0.05


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixed(mixture: str, float32: Harness, expected: Expected, prompts: Prompts) -> None:
    """Chunked so that chunks end before, at and after an activated adapter's start."""
    cases = MIXTURES[mixture]
    requests = [Request(case.adapter, prompts[case.text]) for case in cases]
    answers, steps = float32.run(requests, max_step_tokens=48)
    for case, answer in zip(cases, answers, strict=True):
        compare_float32(case, answer, expected(case), TOLERANCE)
    most = max(len(set(step.digests)) for step in steps)
    assert most == len(cases), "no step held them all"


def test_mixed_with_the_ops_in_plain_torch(
    torch_ops: Harness, expected: Expected, prompts: Prompts
) -> None:
    cases = MIXTURES["kinds"]
    requests = [Request(case.adapter, prompts[case.text], max_tokens=3) for case in cases]
    answers, _ = torch_ops.run(requests)
    for case, answer in zip(cases, answers, strict=True):
        compare_float32(case, answer, expected(case), TOLERANCE)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixed_in_bfloat16(
    mixture: str, bfloat16: Harness, expected: Expected, forced: Forced, peft_error: PeftError
) -> None:
    cases = MIXTURES[mixture]
    answers, _ = bfloat16.run([forced(case) for case in cases], max_step_tokens=48)
    for case, answer in zip(cases, answers, strict=True):
        compare_bfloat16(case, answer, expected(case), peft_error(case))
