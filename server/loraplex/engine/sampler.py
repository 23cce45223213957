"""From logits to tokens: penalties, greedy rows or draws, logprobs; drafts confirmed or not.

A row with drafts (prompt lookup, see speculation.py) has logits after its own last token and after
each of them. At every such place a token is drawn just as without drafts: from the same
distribution, given the drafts before it, with the same uniform number of the row's stream. It
counts as long as those before it equal the drafts that they were computed upon. So the output is
token for token what it is without drafts, up to the order of float sums, greedy or drawn: the
drafts decide only how many tokens come of a step. That is the deterministic case of Leviathan et
al. 2023, in which accepting with probability min(1, p / q) and drawing again from what is left of p
comes to drawing from p and comparing.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.engine.draw import argmax, draw
from loraplex.engine.sequence import Logprobs, Sequence, TokenCounts
from loraplex.engine.step import Drawn, Sampled, Scheduled


class _Line(NamedTuple):
    """One row of logits."""

    sequence: Sequence
    num_ahead: int  # so many drafts stand before it

    @property
    def position(self) -> int:
        """Of the token to draw, in the output."""
        return len(self.sequence.output_token_ids) + self.num_ahead


def sample(logits: Tensor, rows: Seq[Scheduled]) -> list[Drawn]:
    """What is drawn for each row, which all sample; nothing where a row is not finite.

    logits fp32 [sum of 1 + drafts over the rows, vocab], overwritten.
    """
    if not rows:
        return []
    lines = [_Line(row.sequence, ahead) for row in rows for ahead in range(1 + len(row.drafts))]
    sums = logits.sum(dim=-1)  # not finite where a logit is not
    asking = [at for at, line in enumerate(lines) if _num_logprobs(line) is not None]
    raw = torch.log_softmax(logits[asking], dim=-1) if asking else None
    _constrain(logits, rows, lines)
    tokens = _choose(logits, lines)
    logprobs = {} if raw is None else _logprobs(raw, tokens[asking], asking, lines)
    sampled = [
        Sampled(token, logprobs.get(at)) if math.isfinite(total) else None
        for at, (token, total) in enumerate(zip(tokens.tolist(), sums.tolist(), strict=True))
    ]
    return _of_rows(sampled, rows)


def is_greedy(rows: Seq[Scheduled]) -> bool:
    """Whether the largest logits' tokens are all that there is to know."""
    for row in rows:
        sampling, stop = row.sequence.sampling, row.sequence.stop
        if sampling.temperature > 0 or sampling.has_penalties or sampling.num_logprobs is not None:
            return False
        if stop.stop_token_ids and len(row.sequence.output_token_ids) < stop.min_tokens:
            return False
    return True


def confirm(tokens: Seq[int], rows: Seq[Scheduled]) -> list[Drawn]:
    """As `sample`, from the largest logits' tokens; -1: not finite. The rows are greedy."""
    return _of_rows([Sampled(token) if token >= 0 else None for token in tokens], rows)


def _of_rows(sampled: Seq[Sampled | None], rows: Seq[Scheduled]) -> list[Drawn]:
    """From what there is for each line."""
    drawn, at = [], 0
    for row in rows:
        drawn.append(_confirmed(sampled[at : at + 1 + len(row.drafts)], row.drafts))
        at += 1 + len(row.drafts)
    return drawn


def _confirmed(sampled: Seq[Sampled | None], drafts: Seq[int]) -> Drawn:
    """As many as were computed upon tokens that were drawn."""
    taken: list[Sampled] = []
    for at, one in enumerate(sampled):
        if one is None:
            break
        taken.append(one)
        if at < len(drafts) and one.token_id != drafts[at]:
            break
    return tuple(taken)


def _choose(logits: Tensor, lines: Seq[_Line]) -> Tensor:
    """int64 [lines]."""
    drawing = [at for at, line in enumerate(lines) if line.sequence.sampling.temperature > 0]
    params = [lines[at].sequence.sampling for at in drawing]
    positions = [lines[at].position for at in drawing]
    if len(drawing) == len(lines):
        return draw(logits, params, positions)
    tokens = argmax(logits)
    if drawing:
        tokens[drawing] = draw(logits[drawing], params, positions)
    return tokens


# Penalties, and no stop token before min_tokens.


@dataclass(slots=True)
class _Penalised:
    """The logits that penalties change, and by how much; a list's entry is one line's."""

    tokens: list[Tensor] = field(default_factory=list)  # int64, places in all logits
    counts: list[Tensor] = field(default_factory=list)  # fp32, how often in the output
    penalties: list[tuple[float, float, float]] = field(default_factory=list)


def _constrain(logits: Tensor, rows: Seq[Scheduled], lines: Seq[_Line]) -> None:
    """In place."""
    penalised, vocab, start = _Penalised(), logits.shape[-1], 0
    for row in rows:
        if row.sequence.sampling.has_penalties:
            _collect(row, start * vocab, vocab, penalised)
        start += 1 + len(row.drafts)
    if penalised.tokens:
        _penalize(logits.view(-1), penalised)
    forbidden = [
        at * vocab + token
        for at, line in enumerate(lines)
        # A request may name the whole vocabulary; then there is no other token to draw.
        if line.position < (stop := line.sequence.stop).min_tokens
        and len(stop.stop_token_ids) < vocab
        for token in stop.stop_token_ids
    ]
    if forbidden:
        logits.view(-1)[torch.tensor(forbidden, device=logits.device)] = -torch.inf


def _collect(row: Scheduled, place: int, vocab: int, penalised: _Penalised) -> None:
    """For each of the row's lines, whose logits begin at `place` and follow one another."""
    counts, params = _counts_of(row.sequence), row.sequence.sampling
    sizes = []
    for ahead in range(1 + len(row.drafts)):
        penalised.tokens.append(torch.frombuffer(counts.tokens, dtype=torch.int64) + place)
        penalised.counts.append(torch.frombuffer(counts.counts, dtype=torch.float32).clone())
        penalised.penalties.append(
            (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        )
        place += vocab
        if ahead < len(row.drafts):
            sizes.append(len(counts.tokens))
            counts.push(row.drafts[ahead])
    for draft, size in zip(reversed(row.drafts), reversed(sizes), strict=True):
        counts.pop(draft, size)


def _counts_of(sequence: Sequence) -> TokenCounts:
    """Of all its tokens so far."""
    if sequence.token_counts is None:
        sequence.token_counts = TokenCounts(sequence.prompt_token_ids)
    for token in sequence.output_token_ids[sequence.token_counts.num_output :]:
        sequence.token_counts.push(token)
    return sequence.token_counts


def _penalize(logits: Tensor, penalised: _Penalised) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; the others over the output."""
    sizes = torch.tensor([len(tokens) for tokens in penalised.tokens])
    of_line = torch.tensor(penalised.penalties, dtype=torch.float32)
    repetition, presence, frequency = of_line.repeat_interleave(sizes, dim=0).to(logits.device).T
    places = torch.cat(penalised.tokens).to(logits.device)
    counts = torch.cat(penalised.counts).to(logits.device)
    scores = logits[places]
    largest = torch.finfo(scores.dtype).max
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores.clamp_(-largest, largest)
    logits[places] = scores - (presence * (counts > 0) + frequency * counts)


# Logprobs.


def _logprobs(
    raw: Tensor, tokens: Tensor, asking: Seq[int], lines: Seq[_Line]
) -> Mapping[int, Logprobs]:
    """By line, of the tokens drawn there. raw fp32 [asking, vocab], tokens int64 [asking]."""
    chosen = raw.gather(1, tokens[:, None])[:, 0].tolist()
    counts = [_num_logprobs(lines[at]) or 0 for at in asking]
    tops = [() if count == 0 else _top(raw[row], count) for row, count in enumerate(counts)]
    entries = map(Logprobs, chosen, tops)
    return dict(zip(asking, entries, strict=True))


def _top(raw: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, tokens = raw.topk(count)
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def _num_logprobs(line: _Line) -> int | None:
    return line.sequence.sampling.num_logprobs
