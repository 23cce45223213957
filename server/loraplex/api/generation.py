"""One sequence on its way out: the engine's events as the messages of Generate."""

from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import replace

from loraplex_protos.v1 import inference_pb2 as pb

from loraplex.api.calls import Call
from loraplex.api.completion import Completion
from loraplex.api.protocols import Detokenizer, EngineLike, TokenStream
from loraplex.engine.sequence import Finished, FinishReason, Sequence
from loraplex.metrics import Metrics

_REASONS = {
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


class Generation:
    """Mutable: `_completion`, `_running` (the engine has the sequence), `_end` (how it ended)."""

    def __init__(
        self,
        sequence: Sequence,
        used: Seq[pb.UsedAdapter],
        engine: EngineLike,
        detokenizer: Detokenizer,
        stop_strings: Seq[str],
    ) -> None:
        self._sequence = sequence
        self._used = used
        self._engine = engine
        self._completion = Completion(detokenizer, sequence.stop, stop_strings)
        self._running = False
        self._end: Finished | None = None

    async def run(self, call: Call, metrics: Metrics) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Started, deltas, finished; however it ends, the engine has let go of the sequence."""
        stream = self._engine.submit(self._sequence)
        self._running = True
        started = self._started()
        call.note(prompt_tokens=started.prompt_tokens)
        meter = metrics.request(started.prompt_tokens, call.started)
        outcome = "cancelled"
        try:
            yield pb.GenerateResponse(started=started)
            async with aclosing(self._deltas(stream)) as deltas:
                async for delta in deltas:
                    meter.tokens(len(delta.token_ids))
                    yield pb.GenerateResponse(delta=delta)
            assert self._end is not None, "the engine's stream ended without Finished"
            meter.finished(self._end.timings)
            outcome = self._end.reason.value
            yield pb.GenerateResponse(finished=self._finished(self._end))
        except Exception:
            outcome = "error"
            raise
        finally:
            self._let_go()
            meter.ended(outcome)
            call.note(completion_tokens=self._completion.num_tokens, outcome=outcome)

    async def _deltas(self, stream: TokenStream) -> AsyncGenerator[pb.Delta, None]:
        """The output up to the engine's end or the first stop string; sets `_end`."""
        async for event in stream:
            if isinstance(event, Finished):
                self._running = False
                self._end = event
                break
            delta = self._completion.push(event)
            if self._completion.matched is not None:
                self._let_go()
                cached, timings = self._sequence.num_cached, stream.timings()
                self._end = Finished(FinishReason.STOP_STRING, None, cached, timings)
                yield delta
                return
            yield delta
        rest = self._completion.flush()
        if self._completion.matched is not None and self._end is not None:
            self._end = replace(self._end, reason=FinishReason.STOP_STRING)
        if rest:
            yield pb.Delta(text=rest)

    def _let_go(self) -> None:
        if self._running:
            self._running = False
            self._engine.abort(self._sequence.request_id)

    def _started(self) -> pb.Started:
        return pb.Started(
            request_id=self._sequence.request_id,
            adapters=self._used,
            prompt_tokens=len(self._sequence.prompt_token_ids),
        )

    def _finished(self, end: Finished) -> pb.Finished:
        matches = {
            FinishReason.STOP_TOKEN: pb.StopMatch(token_id=end.stop_token_id),
            FinishReason.STOP_STRING: pb.StopMatch(text=self._completion.matched),
        }
        return pb.Finished(
            finish_reason=_REASONS[end.reason],
            stop_match=matches.get(end.reason),
            usage=pb.Usage(
                prompt_tokens=len(self._sequence.prompt_token_ids),
                cached_tokens=end.cached_tokens,
                completion_tokens=self._completion.num_tokens,
            ),
            timings=pb.Timings(
                queue=end.timings.queue,
                prefill=end.timings.prefill,
                decode=end.timings.decode,
                adapter_wait=end.timings.adapter_wait,
            ),
        )
