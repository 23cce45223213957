"""What each adapter says when it is alone: the reference for everything said in company."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from loraplex.adapters.packing import PackedAdapter, pack
from loraplex.adapters.peft import read_adapter, read_config, version_of
from loraplex.api.adaptation import last_occurrence
from loraplex.config import ServeConfig
from loraplex.engine.sequence import SamplingParams, StopParams
from loraplex.engine.sequence import Sequence as EngineSequence
from loraplex.engine.step import Sampled, Scheduled
from loraplex.startup import build_runner, layout_of, load_base, plan_memory

from tests.lifecycle.tiny import Content

GREEDY = SamplingParams(temperature=0.0, num_logprobs=2)
TIE = 1e-4
"""Log-probabilities so near each other may change places between two batches in float32."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """Greedy tokens, and how far ahead of the second best each of them was."""

    token_ids: tuple[int, ...]
    leads: tuple[float, ...]

    def agrees_with(self, token_ids: Sequence[int]) -> bool:
        """Whether these are the same tokens, up to the first that was as good as a tie."""
        for said, expected, lead in zip(token_ids, self.token_ids, self.leads, strict=False):
            if said != expected:
                return lead < TIE
        return len(token_ids) <= len(self.token_ids)


class Solo:
    """A model runner with room for everything, one sequence at a time and nobody else in it.

    Mutable: the runner's memory, whose first blocks are the sequence's.
    """

    def __init__(self, config: ServeConfig, max_tokens: int) -> None:
        self.base = load_base(config)
        memory = plan_memory(config, self.base)
        self._runner = build_runner(config, self.base, memory)
        self._layout = layout_of(self.base, memory)
        self._max_rank = config.max_rank
        self._num_kv = -(-max_tokens // memory.block.tokens)
        self.speak = lru_cache(maxsize=None)(self._speak)

    def version(self, content: Content) -> str:
        config = read_config(content.config_json, self._max_rank)
        sha256 = hashlib.sha256(content.weights.read_bytes()).hexdigest()
        return version_of(sha256, config, self.base.identity)

    def _speak(
        self, parts: tuple[tuple[Content, float], ...], prompt: tuple[int, ...], num_tokens: int
    ) -> Spoken:
        """What the weighted sum of these adapters (none: the base) goes on to say."""
        slot, start = self._bind(parts), 0
        if len(parts) == 1 and parts[0][0].invocation_tokens:
            invoked = last_occurrence(parts[0][0].invocation_tokens, prompt)
            slot, start = (None, 0) if invoked is None else (slot, invoked)
        stop = StopParams(num_tokens)
        sequence = EngineSequence("solo", prompt, GREEDY, stop, slot=slot, adapter_start=start)
        sequence.block_table = list(range(self._num_kv))
        leads = []
        for _ in range(num_tokens):
            start, end = sequence.num_computed, sequence.num_tokens
            row = Scheduled(sequence, start, end - start, samples=True)
            ((drawn,),) = self._runner.run([row])
            sequence.num_computed = end
            leads.append(self._take(sequence, drawn))
        return Spoken(tuple(sequence.output_token_ids), tuple(leads))

    def _take(self, sequence: EngineSequence, drawn: Sampled) -> float:
        assert drawn.logprobs is not None
        sequence.output_token_ids.append(drawn.token_id)
        (_, first), (_, second) = drawn.logprobs.top
        return first - second

    def _bind(self, parts: tuple[tuple[Content, float], ...]) -> int | None:
        if not parts:
            return None
        first = self._num_kv
        for slot, (content, _) in enumerate(parts):
            packed = self._pack(content)
            blocks = range(first, first + packed.num_blocks)
            self._runner.copy_adapter(packed, blocks)
            self._runner.bind_slot(slot, packed, blocks)
            first = blocks.stop
        if len(parts) == 1 and parts[0][1] == 1.0:
            return 0
        weights = [weight for _, weight in parts]
        self._runner.bind_blend(len(parts), list(enumerate(weights)))
        return len(parts)

    def _pack(self, content: Content) -> PackedAdapter:
        config = read_config(content.config_json, self._max_rank)
        spec = read_adapter(content.weights, config, self.base.linears, self._max_rank)
        return pack(content.weights, spec, self._layout, self.base.decoder.base_weight)
