"""A token a row by its own parameters and its own random stream, all rows in the same few calls.

A row draws one uniform number a token, a hash of its seed and of how many tokens it has; the token
is where the cumulated weights pass it. Rows never mix and ties go to the lower token, so a seed
gives the same tokens whatever else is in the batch. Filters apply in transformers' order:
temperature, top_k, top_p, min_p.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraplex.engine.sequence import SamplingParams

CHUNK = 64
"""Logits are looked through by their chunks' maxima and sums: 64 times fewer numbers."""

CANDIDATES = (64, 1024)
"""So many most likely tokens are sorted at first; a row that needs more gets a full sort."""

MIN_TEMPERATURE = 1e-30
"""Below, the most likely token alone is left anyway."""


def argmax(logits: Tensor) -> Tensor:
    """int64 [rows]: the largest of each row, the first of equal ones. logits fp32 [rows, vocab]."""
    if logits.shape[-1] % CHUNK:
        return logits.argmax(dim=-1)
    chunks = logits.view(len(logits), -1, CHUNK)
    best = chunks.amax(dim=-1).argmax(dim=-1)
    return best * CHUNK + _take(chunks, best).argmax(dim=-1)


def draw(logits: Tensor, params: Seq[SamplingParams], positions: Seq[int]) -> Tensor:
    """int64 [rows] from penalised logits fp32 [rows, vocab], overwritten.

    Row i draws its `positions[i]`-th token. A row that is not finite draws any.
    """
    weights = _weights(logits, params)
    uniforms = torch.tensor(
        [uniform_at(row.seed, at) for row, at in zip(params, positions, strict=True)],
        dtype=torch.float64,
        device=logits.device,
    )
    plain = [index for index, row in enumerate(params) if not _is_cut(row)]
    left = [index for index, row in enumerate(params) if _is_cut(row)]
    if not left:
        return _pick(_drop_unlikely(weights, params), uniforms)
    tokens = torch.empty(len(weights), dtype=torch.int64, device=logits.device)
    if plain:
        likely = _drop_unlikely(weights[plain], [params[index] for index in plain])
        tokens[plain] = _pick(likely, uniforms[plain])
    totals = _totals(weights) if any(not params[at].top_k for at in left) else uniforms
    vocab = weights.shape[-1]
    for count in (*(count for count in CANDIDATES if count < vocab), vocab):
        rows = [index for index in left if min(params[index].top_k, vocab) <= count]
        if not rows:
            continue
        part = weights if len(rows) == len(weights) else weights[rows]
        several = [params[index] for index in rows]
        drawn, is_sure = _draw_among(part, totals[rows], several, uniforms[rows], count)
        tokens[rows] = drawn
        sure = {index for index, is_so in zip(rows, is_sure, strict=True) if is_so}
        left = [index for index in left if index not in sure]
    return tokens


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _weights(logits: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """exp((logits - max) / temperature), 1 for the most likely token; a multiple of CHUNK wide."""
    if extra := -logits.shape[-1] % CHUNK:
        logits = pad(logits, (0, extra), value=-torch.inf)
    temperatures = _column([max(row.temperature, MIN_TEMPERATURE) for row in params], logits)
    # At most 0, and a divisor whose reciprocal is finite: nothing overflows.
    maxima = logits.view(len(logits), -1, CHUNK).amax(dim=-1).amax(dim=-1, keepdim=True)
    return logits.sub_(maxima).div_(temperatures).exp_()


def _totals(weights: Tensor) -> Tensor:
    """fp64 [rows]."""
    return weights.view(len(weights), -1, CHUNK).sum(dim=-1).sum(dim=-1, dtype=torch.float64)


def _draw_among(
    weights: Tensor, totals: Tensor, params: Seq[SamplingParams], uniforms: Tensor, count: int
) -> tuple[Tensor, list[bool]]:
    """Tokens drawn from each row's `count` most likely ones; whether no other could have been."""
    vocab = weights.shape[-1]
    candidates, tokens = most_likely(weights, count)
    keep = _column([min(row.top_k or vocab, vocab) for row in params], tokens)
    places = torch.arange(candidates.shape[-1], device=tokens.device)
    values = candidates.double() * (places < keep)
    sums = values.cumsum(dim=-1)
    is_whole = keep[:, 0] <= candidates.shape[-1]
    totals = torch.where(is_whole, sums[:, -1], totals)  # top_p is over what top_k leaves
    inside = sums - values < _column([row.top_p for row in params], sums) * totals[:, None]
    is_sure = is_whole | ~inside[:, -1]
    likely = _drop_unlikely(values * inside, params)
    return tokens.gather(1, _pick(likely, uniforms)[:, None])[:, 0], is_sure.tolist()


def most_likely(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, the lower token first where they are equal; and which.

    weights fp32 [rows, vocab], not negative. With few to find, those chunks are looked through
    whose maxima are the largest: no other chunk can hold one of them.
    """
    num_rows, width = weights.shape
    if count >= width:
        sorted_ = torch.sort(weights, dim=-1, descending=True, stable=True)
        return sorted_.values, sorted_.indices
    if count * CHUNK * 2 > width:
        tokens = _largest(weights, count)
        return weights.gather(1, tokens), tokens
    chunks = weights.view(num_rows, -1, CHUNK)
    best = _largest(chunks.amax(dim=-1), count).sort(dim=-1).values  # so that ties stay in order
    held = chunks.gather(1, best[:, :, None].expand(-1, -1, CHUNK)).view(num_rows, -1)
    places = _largest(held, count)
    tokens = best.gather(1, places // CHUNK) * CHUNK + places % CHUNK
    return held.gather(1, places), tokens


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest, descending, the first of equal ones first.

    A float that is not negative orders as its bits do; below them stands the place, so that no two
    keys are equal and the answer is one whatever the algorithm.
    """
    width = values.shape[-1]
    last = torch.arange(width - 1, -1, -1, device=values.device)
    keys = (values.view(torch.int32).long() << 32) | last
    return width - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)


def _drop_unlikely(weights: Tensor, params: Seq[SamplingParams]) -> Tensor:
    """Zero, in place, what is below min_p times the most likely token's weight, which is 1."""
    if any(row.min_p > 0.0 for row in params):
        weights.mul_(weights >= _column([row.min_p for row in params], weights))
    return weights


def _pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """int64 [rows]: where the cumulated weights pass that part of their sum."""
    chunks = weights.view(len(weights), -1, CHUNK) if weights.shape[-1] % CHUNK == 0 else None
    if chunks is None:
        return _pass(weights.double(), uniforms)[0]
    sums = chunks.sum(dim=-1).double()
    chunk, rest = _pass(sums, uniforms)
    return chunk * CHUNK + _pass(_take(chunks, chunk).double(), rest)[0]


def _pass(weights: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the cumulated weights pass `parts` of their sum, and how far into it."""
    sums = weights.cumsum(dim=-1)
    goal = parts[:, None] * sums[:, -1:]
    places = torch.arange(weights.shape[-1], device=weights.device)
    last = (places * (weights > 0)).amax(dim=-1)
    index = (sums <= goal).sum(dim=-1).minimum(last)[:, None]
    size = weights.gather(1, index)
    into = (goal - (sums.gather(1, index) - size)) / size
    return index[:, 0], into[:, 0].clamp(0.0, 1.0)


def _take(chunks: Tensor, index: Tensor) -> Tensor:
    """[rows, CHUNK]: one chunk of each row."""
    return chunks.gather(1, index[:, None, None].expand(-1, 1, CHUNK))[:, 0]


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


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
