"""What sequences read from their blocks is what they, or somebody just like them, wrote there.

A model of memory: each block holds, token by token, whose KV it is and all that it was made of: the
tokens up to there and who acted on each. A sequence that reads must find exactly its own history,
whoever computed it, and it writes only where nobody else reads.
"""

from random import Random

import pytest
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import BlendPart, Phase, SamplingParams, Sequence, StopParams

Cell = tuple[str, tuple[tuple[int, str | None], ...]]
"""Whose it is; and each token up to there, with who acted on it."""

NUM_OPERATIONS = 300
VOCAB = 3
VERSIONS = "ab"


def sequence_of(tenant: str, digest: str | None, start: int, prompt: list[int]) -> Sequence:
    """A digest such as "a+b" is a blend, which has no start of its own."""
    parts = digest.split("+") if digest and "+" in digest else []
    blend = tuple(BlendPart(version, 1.0) for version in parts)
    start = 0 if blend or digest is None else min(start, len(prompt) - 1)
    sequence = Sequence("r", prompt, SamplingParams(), StopParams(50), digest, blend=blend)
    sequence.tenant, sequence.adapter_start = tenant, start
    return sequence


def cell(sequence: Sequence, tokens: list[int]) -> Cell:
    """Of the last of these tokens, which the sequence has, or may have next."""
    start, digest = sequence.adapter_start, sequence.digest
    return sequence.tenant, tuple((t, digest if i >= start else None) for i, t in enumerate(tokens))


def next_token(tokens: list[int]) -> int:
    """What the model draws: the same after the same tokens."""
    return sum(at * token for at, token in enumerate(tokens, 1)) % VOCAB


class World:
    """Mutable: `contents` by block: a cell for each token, or None where none was written."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = Random(seed)
        self.size, self.adapter_blocks = rng.randint(1, 4), rng.randint(1, 4)
        self.arena = Arena(rng.randint(40, 100) // self.size)
        self.pool = AdapterPool(self.arena, num_slots=4)
        self.kv = KVMemory(self.arena, self.pool, self.size, with_prefixes=True)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.contents: dict[int, list[Cell | None]] = {}
        self.texts = [[rng.randrange(VOCAB) for _ in range(16)] for _ in range(2)]

    def act(self) -> None:
        """Something that may happen."""
        pace = self.rng.random()
        if pace < 0.2 and len(self.waiting) < 4:
            self.waiting.append(self.request())
        elif pace < 0.45 and self.waiting:
            self.admit(self.waiting[0] if pace < 0.4 else self.rng.choice(self.waiting))
        elif pace < 0.85 and self.running:
            self.step(self.rng.choice(self.running))
        elif pace < 0.95 and self.running:
            self.end(self.rng.choice(self.running))
        elif pace < 0.96:
            self.pool.forget(self.rng.choice(VERSIONS))
        elif pace < 0.97:
            self.make_room()

    def request(self) -> Sequence:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.randint(1, 16)]
        prompt += [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 2]))]
        tenant = rng.choice(["", "", "", "other"])
        digest = rng.choice([None, None, "a", "a", "b", "a+b"])
        return sequence_of(tenant, digest, rng.choice([0, 0, 5, 6, rng.randint(0, 12)]), prompt)

    def admit(self, sequence: Sequence) -> None:
        keep = {*sequence.versions, *([sequence.digest] if sequence.digest else [])}
        if not all(self.bring(version, keep) for version in sequence.versions):
            return
        unbound = sequence.digest is not None and self.pool.get(sequence.digest) is None
        room, before = self.pool.room(keep), repr(self.arena)
        if not self.kv.start(sequence, int(unbound), keep):
            blocks = self.kv.blocks_for(sequence.num_tokens)
            assert blocks > room.blocks or unbound > room.slots, "there was room"
            assert repr(self.arena) == before
            return
        if sequence.digest is not None:
            if unbound:
                assert self.pool.bind(sequence.digest, sequence.blend, keep) is not None
            self.pool.acquire(sequence.digest)
        assert sequence.num_computed < sequence.num_tokens, "nothing is left to draw from"
        sequence.phase, sequence.admitted_at = Phase.RUNNING, 0.0
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def bring(self, version: str, keep: set[str]) -> bool:
        if self.pool.get(version) is not None:
            return True
        room = self.pool.room(keep)
        load = self.pool.reserve(version, self.adapter_blocks, keep)
        if load is None:
            assert room.blocks < self.adapter_blocks or room.slots < 1, "there was room"
            return False
        for block in load.blocks:
            self.contents.pop(block, None)
        self.pool.loaded(version)
        return True

    def step(self, sequence: Sequence) -> None:
        """Compute some tokens; where it draws, drafts with them, up to the first that is wrong."""
        rng = self.rng
        if sequence.num_tokens - sequence.num_computed > 1:
            self.kv.catch_up(sequence)
            self.read(sequence)
        missing = sequence.num_tokens - sequence.num_computed
        num_tokens = min(missing, rng.choice([1, 3, 30]))
        samples = num_tokens == missing
        drafts = self.drafts(sequence) if samples else []
        tokens = [*sequence.token_ids(0, sequence.num_tokens), *drafts]
        start = sequence.num_computed
        end = start + num_tokens + len(drafts)
        if not self.grow(sequence, end):
            return
        for at in range(start, end):
            self.write(sequence, at, cell(sequence, tokens[: at + 1]))
        self.read(sequence)
        drawn: list[int] = []
        if samples:
            known = sequence.token_ids(0, sequence.num_tokens)
            for draft in [*drafts, None]:
                drawn.append(next_token([*known, *drawn]))
                if draft != drawn[-1]:
                    break
        sequence.num_computed = start + num_tokens + max(0, len(drawn) - 1)
        self.kv.commit(sequence)
        stops = samples and rng.random() < 0.1  # perhaps before the last draft that was confirmed
        sequence.output_token_ids += drawn[: rng.randint(1, len(drawn))] if stops else drawn
        if stops or sequence.num_tokens > 24:
            self.stop(sequence)

    def drafts(self, sequence: Sequence) -> list[int]:
        """Right more often than not."""
        tokens = sequence.token_ids(0, sequence.num_tokens)
        for _ in range(self.rng.choice([0, 0, 2, 5])):
            tokens.append(next_token(tokens) if self.rng.random() < 0.8 else 0)
        return tokens[sequence.num_tokens :]

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        while self.kv.grow(sequence, num_tokens) is None:
            newest = self.running[-1]
            self.stop(newest)
            if newest is sequence:
                return False
            self.waiting.append(newest)
        return True

    def write(self, sequence: Sequence, at: int, what: Cell) -> None:
        block = sequence.block_table[at // self.size]
        assert self.pool.prefixes.at(block) is None, "a cached block is written"
        assert not any(block in s.block_table for s in self.running if s is not sequence)
        self.contents.setdefault(block, [None] * self.size)[at % self.size] = what

    def read(self, sequence: Sequence) -> None:
        tokens = sequence.token_ids(0, sequence.num_tokens)
        for at in range(min(sequence.num_computed, len(tokens))):
            found = self.contents[sequence.block_table[at // self.size]][at % self.size]
            assert found == cell(sequence, tokens[: at + 1]), "somebody else's KV"

    def stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.phase = Phase.WAITING
        self.kv.release(sequence)
        if sequence.digest is not None:
            self.pool.release(sequence.digest)

    def end(self, sequence: Sequence) -> None:
        fate = self.rng.choice(["finish", "preempt", "preempt", "nan"])
        if fate == "nan":
            own = set(sequence.block_table)
            shared = {b for s in self.running if s is not sequence for b in s.block_table}
            self.kv.discard(sequence)
            assert not any(self.pool.prefixes.at(block) for block in own - shared)
        self.stop(sequence)
        if fate == "preempt":
            self.waiting.append(sequence)

    def make_room(self) -> None:
        num_blocks, room = self.rng.randint(1, 10), self.pool.room(())
        is_there = self.pool.make_room(num_blocks) is not None
        assert is_there == (num_blocks <= room.blocks)
        assert not is_there or self.arena.num_free >= num_blocks

    def check(self) -> None:
        self.arena.check_integrity()
        self.pool.check_integrity()
        self.kv.check_integrity(self.running)
        for sequence in self.running:
            self.read(sequence)

    def clear(self) -> None:
        while self.running:
            self.stop(self.running[0])
        self.check()
        assert self.arena.count(Use.KV) == 0
        for version in VERSIONS:
            self.pool.forget(version)
        self.pool.prefixes.clear()
        assert self.arena.num_free == self.arena.num_blocks


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_nobody_reads_what_is_not_its_own(first: int) -> None:
    num_found = 0
    for seed in range(first, first + 10):
        world = World(seed)
        for _ in range(NUM_OPERATIONS):
            world.act()
            world.check()
        num_found += world.kv.stats.num_found
        world.clear()
    assert num_found > 300, "little was shared"
