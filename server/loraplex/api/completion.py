"""Sampled tokens to what the client sees: whole text, ended by the first stop string."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.api.protocols import Detokenizer
from loraplex.engine.sequence import Finished, Logprobs, StopParams, Tokens
from loraplex.model.stop import StopBuffer


class Completion:
    """One request's text. Mutable: all but `stop`; `matched` is the stop string that ended it."""

    def __init__(self, detokenizer: Detokenizer, stop: StopParams, stop_strings: Seq[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._stop_strings = StopBuffer(stop_strings)
        self._held: int | None = (
            None  # may be the stop token, which is no text; the next event tells
        )
        self.num_tokens = 0
        self.matched: str | None = None

    def push(self, tokens: Tokens) -> pb.Delta:
        """The tokens as a delta; those after the one that completes a stop string are dropped."""
        text, taken = "", 0
        while taken < len(tokens.token_ids) and self.matched is None:
            text += self._push(tokens.token_ids[taken])
            taken += 1
        return pb.Delta(
            text=text,
            token_ids=tokens.token_ids[:taken],
            logprobs=[_logprobs(entry) for entry in tokens.logprobs[:taken]],
        )

    def finish(self, stop_token_id: int | None) -> str:
        """The text that was held back, now that no token follows."""
        token_ids = [] if self._held is None or stop_token_id is not None else [self._held]
        text = self._detokenizer.push(token_ids) + self._detokenizer.flush()
        emitted = self._examine(text)
        return emitted if self.matched is not None else emitted + self._stop_strings.flush()

    def _push(self, token_id: int) -> str:
        ready = [] if self._held is None else [self._held]
        self._held = None
        if token_id in self._stop.stop_token_ids:
            self._held = token_id
        else:
            ready.append(token_id)
        self.num_tokens += 1
        return self._examine(self._detokenizer.push(ready))

    def _examine(self, text: str) -> str:
        """What may be sent of it; before min_tokens nothing counts as a stop string."""
        if self.num_tokens < self._stop.min_tokens:
            return text
        emitted, self.matched = self._stop_strings.push(text)
        return emitted


def _logprobs(entry: Logprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token, logprob=value) for token, value in entry.top]
    return pb.TokenLogprobs(logprob=entry.logprob, top=top)


async def coalesced(stream: AsyncIterator[Tokens | Finished]) -> AsyncIterator[Tokens | Finished]:
    """The stream's events; tokens that came while the reader was busy are one event."""

    async def read() -> Tokens | Finished | None:
        return await anext(stream, None)

    pending = asyncio.ensure_future(read())
    try:
        while (event := await pending) is not None:
            pending = asyncio.ensure_future(read())
            await asyncio.sleep(0)  # lets it take what is there already
            while isinstance(event, Tokens) and (more := _ready_tokens(pending)) is not None:
                event = Tokens(event.token_ids + more.token_ids, event.logprobs + more.logprobs)
                pending = asyncio.ensure_future(read())
                await asyncio.sleep(0)
            yield event
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)


def _ready_tokens(pending: "asyncio.Future[Tokens | Finished | None]") -> Tokens | None:
    if not pending.done() or pending.cancelled() or pending.exception() is not None:
        return None
    event = pending.result()
    return event if isinstance(event, Tokens) else None
