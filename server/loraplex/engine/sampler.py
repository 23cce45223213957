"""From logits to tokens: every row with its own parameters and its own random stream.

A row draws one uniform number a token, a hash of its seed and of how many tokens it has; the token
is where the cumulated probabilities pass it. So a seed gives the same tokens whatever else is in
the batch. Filters apply in transformers' order: penalties, temperature, top_k, top_p, min_p.
"""

from collections import Counter
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from loraplex.engine.scheduler import Drawn, Sampled
from loraplex.engine.sequence import Logprobs, SamplingParams, Sequence

CANDIDATES = 256
"""So many most likely tokens are sorted at first; a row that needs more gets a full sort."""

MIN_TEMPERATURE = 1e-30
"""Below, the most likely token alone is left anyway."""


def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Drawn]:
    """One token a row, none where it is not finite. logits fp32 [rows, vocab], overwritten."""
    finite = torch.isfinite(logits.amax(dim=-1) - logits.amin(dim=-1)).tolist()
    raw = {
        row: _logprobs(logits[row])
        for row, sequence in enumerate(sequences)
        if sequence.sampling.num_logprobs is not None
    }
    for row, sequence in enumerate(sequences):
        _constrain(logits[row], sequence)
    tokens = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        if finite[row] and sequence.sampling.temperature > 0:
            position = len(sequence.output_token_ids)
            tokens[row] = draw(logits[row], sequence.sampling, position)
    return [
        (Sampled(token, _chosen(raw.get(row), token, sequence.sampling.num_logprobs)),)
        if finite[row]
        else ()
        for row, (token, sequence) in enumerate(zip(tokens, sequences, strict=True))
    ]


def _constrain(logits: Tensor, sequence: Sequence) -> None:
    """Penalties, and no stop token before min_tokens; in place, for one row."""
    if sequence.sampling.has_penalties:
        _penalize(logits, sequence)
    stops = sequence.stop.stop_token_ids
    # A request may name the whole vocabulary; then there is no other token to draw.
    if len(sequence.output_token_ids) < sequence.stop.min_tokens and len(stops) < len(logits):
        logits[list(stops)] = -torch.inf


def _penalize(logits: Tensor, sequence: Sequence) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; the others over the output."""
    params, output = sequence.sampling, sequence.output_token_ids
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*sequence.prompt_token_ids, *output}), device=logits.device)
        scores = logits[seen]
        factor = params.repetition_penalty
        largest = torch.finfo(scores.dtype).max
        scores = torch.where(scores > 0, scores / factor, scores * factor)
        logits[seen] = scores.clamp(-largest, largest)
    if output and (params.presence_penalty or params.frequency_penalty):
        counted = Counter(output)
        seen = torch.tensor(list(counted), device=logits.device)
        counts = torch.tensor(list(counted.values()), device=logits.device)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts


def draw(logits: Tensor, params: SamplingParams, position: int) -> int:
    """A token from one row of penalised logits, the row's `position`-th draw."""
    # At most 0, and a divisor whose reciprocal is finite: nothing overflows.
    scaled = (logits - logits.max()) / max(params.temperature, MIN_TEMPERATURE)
    uniform = uniform_at(params.seed, position)
    if params.top_k == 0 and params.top_p >= 1.0:
        probabilities = torch.softmax(scaled, dim=-1)
        return _pick(_drop_unlikely(probabilities, params.min_p), uniform)
    probabilities, tokens = _most_likely(scaled, params)
    return int(tokens[_pick(_drop_unlikely(probabilities, params.min_p), uniform)])


def _most_likely(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that top_k and top_p leave, most likely first, and their probabilities."""
    vocab = scaled.shape[-1]
    keep = min(params.top_k or vocab, vocab)
    count = min(max(CANDIDATES, params.top_k), vocab)
    total = torch.logsumexp(scaled, dim=-1)
    while True:
        values, tokens = scaled.topk(count)
        values, tokens = values[:keep], tokens[:keep]
        if keep <= count:
            total = torch.logsumexp(values, dim=-1)  # top_p is over what top_k leaves
        probabilities = torch.exp(values - total)
        before = probabilities.cumsum(-1) - probabilities
        inside = before < params.top_p
        if keep <= count or not bool(inside[-1]):
            return probabilities[inside], tokens[inside]
        count = vocab


def _drop_unlikely(probabilities: Tensor, min_p: float) -> Tensor:
    """Zero what is less likely than min_p times the most likely token."""
    if min_p <= 0.0:
        return probabilities
    return probabilities.where(probabilities >= min_p * probabilities.max(), 0.0)


def _pick(probabilities: Tensor, uniform: float) -> int:
    """The index at which the cumulated, renormalised probabilities pass `uniform`."""
    cumulated = probabilities.double().cumsum(-1)
    index = int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True))
    last = int(probabilities.nonzero()[-1])
    return min(index, last)


def uniform_at(seed: int, position: int) -> float:
    """A number in [0, 1) from SplitMix64 (Steele et al. 2014) of seed and position."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    for _ in range(2):  # twice, so that neighbouring seeds and positions do not line up
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        z = (z + seed) & mask
    return (z >> 11) / (1 << 53)


def _logprobs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def _chosen(logprobs: Tensor | None, token: int, num_top: int | None) -> Logprobs | None:
    if logprobs is None or num_top is None:
        return None
    values, tokens = logprobs.topk(num_top)
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Logprobs(float(logprobs[token]), top)
