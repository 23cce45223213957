"""transformers + PEFT: a static batch, a KV cache, `adapter_names`.

PEFT's hooks are put in place once a wave. It keeps the adapters in float32, as it does by default.
A wave for the bare base runs on a plain transformers model, which PEFT has not touched. `nf4` is
bitsandbytes' 4-bit linears that compute in bfloat16, of the same codes that Loraplex has.
"""

import copy
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers.pipe import PeerSettings, serve_pipe
from peers.static_batch import decode
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from waves import Reply, Wave

PEFT_BASE = "__base__"  # in `adapter_names`: this row has no adapter


class PeftMixed:
    """The plain model, and a PEFT model of all adapters over the same weights."""

    def __init__(self, settings: PeerSettings) -> None:
        torch.set_num_threads(settings.threads)
        self._plain = _load_base(Path(settings.model), settings.precision)
        self._mixed = _with_adapters(self._plain, settings) if settings.adapters else None

    def run(self, wave: Wave) -> list[Reply]:
        start = time.perf_counter()
        if not any(wave.adapters):
            return decode(self._plain, wave, start)
        assert self._mixed is not None
        names = [name or PEFT_BASE for name in wave.adapters]
        # `PeftModel.generate` does the same; `forward` would put the hooks in place every step.
        with self._mixed._enable_peft_forward_hooks(adapter_names=names):
            return decode(self._mixed.get_base_model(), wave, start)


def _load_base(folder: Path, precision: str) -> Any:
    load = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.bfloat16)
    if precision == "bf16":
        return load().eval()
    assert precision == "nf4"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return load(quantization_config=quantization, device_map="cpu").eval()


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
