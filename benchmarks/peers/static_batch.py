"""transformers as a static batch: what `generate` comes down to, without its overhead.

No padding and hence no mask, logits of the last position alone, the next token by argmax.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from figures import Arrival
from waves import Reply, Wave

Forward = Callable[..., Any]
"""A causal model's call: `input_ids`, `past_key_values`, `use_cache`, `logits_to_keep`."""


@torch.inference_mode()
def decode(forward: Forward, wave: Wave, start: float) -> list[Reply]:
    """All rows advance together, so all timelines are the same. Prompts are of one length.

    `start` is the clock (`time.perf_counter`) when the wave came.
    """
    token_ids = torch.tensor(wave.prompts)  # [batch, prompt length], then [batch, 1]
    cache = None
    moments: list[Arrival] = []
    columns: list[list[int]] = []  # of each step, the tokens of all rows
    while len(columns) < wave.max_tokens:
        output = forward(
            input_ids=token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        token_ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        columns.append(token_ids[:, 0].tolist())
        moments.append(Arrival(time.perf_counter() - start, 1))
        if moments[-1].seconds > wave.seconds:
            break
    timeline = tuple(moments)
    return [Reply(timeline, row) for row in zip(*columns, strict=True)]
