"""Sampled tokens to what the client sees: whole text, ended by the first stop string."""

from collections.abc import Sequence as Seq

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.api.protocols import Detokenizer
from loraplex.engine.sequence import Logprobs, StopParams, Tokens
from loraplex.model.stop import StopBuffer


class Completion:
    """One request's output. Mutable: `num_tokens`, and `matched`, the stop string that ended it."""

    def __init__(self, detokenizer: Detokenizer, stop: StopParams, stop_strings: Seq[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._stop_strings = StopBuffer(stop_strings)
        self._has_stops = bool(stop_strings)
        self.num_tokens = 0
        self.matched: str | None = None

    def push(self, tokens: Tokens) -> pb.Delta:
        """The tokens as a delta; those after the one that completes a stop string are dropped."""
        text, taken = "", 0
        while taken < len(tokens.token_ids) and self.matched is None:
            text += self._push(tokens.token_ids[taken])
            taken += 1
        delta = pb.Delta(text=text, token_ids=tokens.token_ids[:taken])
        if tokens.logprobs:
            delta.logprobs.extend(_logprobs(entry) for entry in tokens.logprobs[:taken])
        return delta

    def flush(self) -> str:
        """The text that was held back, now that no token follows."""
        text = self._examine(self._detokenizer.flush())
        return text if self.matched is not None else text + self._stop_strings.flush()

    def _push(self, token_id: int) -> str:
        self.num_tokens += 1
        if token_id in self._stop.stop_token_ids:
            return ""
        return self._examine(self._detokenizer.push((token_id,)))

    def _examine(self, text: str) -> str:
        """What may be sent of it; before min_tokens nothing counts as a stop string."""
        if not self._has_stops or self.num_tokens < self._stop.min_tokens:
            return text
        emitted, self.matched = self._stop_strings.push(text)
        return emitted


def _logprobs(entry: Logprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token, logprob=value) for token, value in entry.top]
    return pb.TokenLogprobs(logprob=entry.logprob, top=top)
