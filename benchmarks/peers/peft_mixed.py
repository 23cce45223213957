"""transformers + PEFT: a static batch, a KV cache, `adapter_names`, the next token by argmax.

The loop below is what `generate` comes down to, without its overhead: no padding and hence no mask,
logits of the last position alone, PEFT's hooks put in place once a wave. The base's linears hold
the values of their NF4 codes; PEFT keeps the adapters in float32, as it does by default. A wave
for the bare base runs on the plain transformers model, which PEFT has not touched.
"""

import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from figures import Arrival, Timeline
from loraplex.model import nf4
from loraplex.model.config import read_model_config
from peers.pipe import PeerSettings, serve_pipe
from peft import PeftModel
from transformers import AutoModelForCausalLM
from workload import Wave

PEFT_BASE = "__base__"  # in `adapter_names`: this row has no adapter


class PeftMixed:
    """The plain model, and a PEFT model of all adapters over the same weights."""

    def __init__(self, settings: PeerSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._plain = _load_base(Path(settings.model), getattr(torch, settings.dtype))
        self._mixed = _with_adapters(self._plain, settings) if settings.adapters else None

    def run(self, wave: Wave) -> list[Timeline]:
        """All rows advance together, so all timelines are the same."""
        start = time.perf_counter()
        if any(wave.adapters):
            assert self._mixed is not None
            names = [name or PEFT_BASE for name in wave.adapters]
            # `PeftModel.generate` does the same; `forward` would put the hooks in place every step.
            hooks = self._mixed._enable_peft_forward_hooks(adapter_names=names)
            model = self._mixed.get_base_model()
        else:
            hooks, model = nullcontext(), self._plain
        with hooks:
            moments = _decode(model, wave.prompts, wave.max_tokens)
        timeline = tuple(Arrival(moment - start, 1) for moment in moments)
        return [timeline] * len(wave.prompts)


@torch.inference_mode()
def _decode(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[float]:
    """The clock at each step's tokens, as a list of ints; prompts are of one length."""
    token_ids = torch.tensor(prompts)  # [batch, prompt length], then [batch, 1]
    cache = None
    moments = []
    for _ in range(max_tokens):
        output = model(input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token_ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        token_ids.tolist()
        moments.append(time.perf_counter())
    return moments


def _load_base(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for linear in read_model_config(folder).linears():
        weight = model.get_submodule(linear.name).weight
        weight.data = nf4.quantize(weight.data).dequantize()
    return model.to(dtype).eval()


def _with_adapters(plain: Any, settings: PeerSettings) -> Any:
    """PEFT rewrites the modules it is given: they are copies, of the same parameters."""
    shared: dict[int, object] = {id(parameter): parameter for parameter in plain.parameters()}
    modules = copy.deepcopy(plain, shared)
    (first, folder), *others = settings.adapters.items()
    model = PeftModel.from_pretrained(modules, folder, adapter_name=first)
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    return model.eval()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve_pipe(PeftMixed)
