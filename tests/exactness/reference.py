"""transformers + PEFT on the base's dequantised NF4 weights, in float32 and in bfloat16."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from loraplex.model import nf4
from loraplex.model.config import read_model_config
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.exactness.cases import (
    BF16,
    F32,
    NUM_NEW,
    Adapter,
    Blend,
    Folders,
    digest_of,
    peft_as_it_is,
)


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens, and the logits of prompt and tokens, but for the last one's: nobody asks."""

    tokens: list[int]
    logits: Tensor  # fp32 [len(prompt) + len(tokens) - 1, vocab]

    @cached_property
    def largest(self) -> float:
        return float(self.logits.abs().max())

    @cached_property
    def gaps(self) -> list[float]:
        """How far the second most likely token was behind, at each of `tokens`."""
        top = self.logits[-len(self.tokens) :].topk(2).values
        gaps: list[float] = (top[:, 0] - top[:, 1]).tolist()
        return gaps


class Reference:
    """transformers + PEFT, the base's linears at the bf16 values of their NF4 codes.

    The base is float32 or bfloat16, as `PeftModel.from_pretrained` leaves it for either: PEFT keeps
    adapters in float32. Both sets of weights are held, and swapped below the same modules.
    """

    def __init__(self, base: Path, folders: Folders) -> None:
        self._folders = folders
        self._base = base
        self._loaded: set[str] = set()

    @cached_property
    def _model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.bfloat16)
        for linear in read_model_config(self._base).linears():
            weight = model.get_submodule(linear.name).weight
            weight.data = nf4.quantize(weight.data).dequantize()
        first = next(iter(self._folders.generated))
        self._loaded.add(first)
        with peft_as_it_is():
            return PeftModel.from_pretrained(model, self._folders(first), first).eval()

    @cached_property
    def _weights(self) -> dict[torch.dtype, list[tuple[Any, Tensor]]]:
        parameters = [p for n, p in self._model.named_parameters() if "lora_" not in n]
        return {dtype: [(p, p.data.to(dtype)) for p in parameters] for dtype in (BF16, F32)}

    @torch.inference_mode()
    def logits(self, adapter: Adapter, tokens: Sequence[int], dtype: torch.dtype = F32) -> Tensor:
        """fp32 [len(tokens), vocab], in one forward pass."""
        for parameter, values in self._weights[dtype]:
            parameter.data = values
        if adapter is not None:
            self._model.set_adapter(self._name(adapter))
        with self._model.disable_adapter() if adapter is None else nullcontext():
            logits: Tensor = self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits.float()

    def _name(self, adapter: str | Blend) -> str:
        """What PEFT calls it; loaded, or added up, when it is first asked for."""
        name = adapter if isinstance(adapter, str) else digest_of(adapter)
        if name in self._loaded:
            return name
        with peft_as_it_is():
            if isinstance(adapter, str):
                folder = self._folders(adapter)
                self._model.load_adapter(folder, adapter_name=name, low_cpu_mem_usage=True)
            else:
                members = [self._name(member) for member, _ in adapter.members]
                weights = [weight for _, weight in adapter.members]
                self._model.add_weighted_adapter(members, weights, name, combination_type="cat")
        self._loaded.add(name)
        return name

    def greedy(self, adapter: Adapter, prompt: list[int], draft: list[int]) -> Continuation:
        """PEFT's own greedy tokens in float32, whatever the draft; a good one saves passes.

        Speculative decoding (Leviathan et al. 2023): a draft's tokens are kept as far as they are
        what PEFT would have chosen, then one of PEFT's own follows.
        """
        tokens: list[int] = []
        while True:
            guess = tokens + draft[len(tokens) :]
            logits = self.logits(adapter, [*prompt, *guess[: NUM_NEW - 1]])
            chosen = logits[len(prompt) - 1 :].argmax(-1).tolist()
            known = len(tokens)
            while known < len(chosen) and guess[known : known + 1] == chosen[known : known + 1]:
                known += 1
            tokens = chosen[: known + 1]
            draft = []
            if len(tokens) == NUM_NEW:
                return Continuation(tokens, logits)
