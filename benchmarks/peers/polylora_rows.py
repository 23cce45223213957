"""polylora: Triton SGMV over transformers on a GPU, and on a CPU its torch path, row by row."""

import time
import warnings
from functools import partial

import torch
from peers.pipe import PeerSettings, serve_pipe
from peers.static_batch import decode
from polylora import PolyLoraConfig, PolyLoraModel  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM
from waves import Reply, Wave

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Polylora:
    """A model whose linears polylora has replaced, with slots for all adapters."""

    def __init__(self, settings: PeerSettings) -> None:
        torch.set_num_threads(settings.threads)
        base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16)
        config = PolyLoraConfig(
            # Slot 0 is the bare base's.
            max_gpu_adapters=len(settings.adapters) + 1,
            max_rank=settings.rank,
            target_modules=MODULES,
        )
        self._model = PolyLoraModel(base.eval(), config).eval()
        for name, folder in settings.adapters.items():
            self._model.load_adapter_from_disk(name, folder)

    def run(self, wave: Wave) -> list[Reply]:
        start = time.perf_counter()
        if not any(wave.adapters):
            return decode(self._model, wave, start)
        base = self._model.config.base_adapter_id
        names = [name or base for name in wave.adapters]
        return decode(partial(self._model, adapter_ids=names), wave, start)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve_pipe(Polylora)
