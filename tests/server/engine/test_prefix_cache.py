"""Who begins with the same tokens, for the same tenant and adapter, finds their KV; nobody else."""

import pytest
from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.kv_memory import KVMemory
from loraplex.engine.sequence import Sequence

from tests.server.engine.test_kv_memory import sequence_of

SIZE = 4


class Memory:
    """KV memory in whose blocks every sequence computes at once all that it can."""

    def __init__(self, num_blocks: int = 100, num_slots: int = 4) -> None:
        self.arena = Arena(num_blocks)
        self.pool = AdapterPool(self.arena, num_slots)
        self.kv = KVMemory(self.arena, self.pool, SIZE, with_prefixes=True)
        self.running: list[Sequence] = []

    def start(self, sequence: Sequence) -> int:
        """The tokens that were there."""
        assert self.kv.start(sequence, 0, ())
        found = sequence.num_computed
        self.running.append(sequence)
        sequence.admitted_at = 0.0
        sequence.num_computed = sequence.num_tokens
        self.kv.commit(sequence)
        self.check()
        return found

    def release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv.release(sequence)
        self.check()

    def use(self, sequence: Sequence) -> int:
        found = self.start(sequence)
        self.release(sequence)
        return found

    def check(self) -> None:
        self.arena.check_integrity()
        self.pool.check_integrity()
        self.kv.check_integrity(self.running)

    def load(self, version: str, num_blocks: int) -> None:
        assert self.pool.reserve(version, num_blocks) is not None
        self.pool.loaded(version)

    def touch(self, version: str) -> None:
        self.pool.acquire(version)
        self.pool.release(version)


def asked(
    prompt: list[int], digest: str | None = None, start: int = 0, tenant: str = ""
) -> Sequence:
    return sequence_of(tenant, digest, start, prompt)


LONG = list(range(20))


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (asked(LONG), asked(LONG), 16),  # the last token is always computed
        (asked(LONG), asked([*LONG, 1]), 20),
        (asked(LONG), asked(LONG[:17]), 16),
        (asked(LONG), asked(LONG[:16]), 12),
        (asked(LONG), asked([*LONG[:9], 50, *LONG[10:]]), 8),
        (asked(LONG), asked([50, *LONG[1:]]), 0),
        (asked(LONG[:3]), asked(LONG), 0),  # only full blocks are kept
        (asked(LONG), asked(LONG, tenant="other"), 0),
        (asked(LONG, tenant="other"), asked(LONG, tenant="other"), 16),
        (asked(LONG, "a"), asked(LONG, "a"), 16),
        (asked(LONG, "a"), asked(LONG, "b"), 0),
        (asked(LONG, "a"), asked(LONG), 0),
        (asked(LONG), asked(LONG, "a"), 0),
        (asked(LONG, "a"), asked(LONG, "a", tenant="other"), 0),
        (asked(LONG, "a+b"), asked(LONG, "a+b"), 16),
        (asked(LONG, "a+b"), asked(LONG, "a"), 0),
        # Activated ones: what lies before their start is the base's, and everybody's.
        (asked(LONG), asked(LONG, "a", start=12), 12),
        (asked(LONG), asked(LONG, "a", start=13), 12),
        (asked(LONG), asked(LONG, "a", start=15), 12),
        (asked(LONG), asked(LONG, "a", start=16), 16),
        (asked(LONG, "b", start=13), asked(LONG, "a", start=14), 12),
        (asked(LONG, "b", start=13), asked(LONG), 12),
        (asked(LONG, "a", start=6), asked(LONG, "a", start=6), 16),
        (asked(LONG, "a", start=6), asked(LONG, "a", start=7), 4),
        (asked(LONG, "a", start=6), asked(LONG, "a", start=8), 4),
        (asked(LONG, "a"), asked(LONG, "a", start=6), 0),
        (asked(LONG), asked(LONG, "a", start=12, tenant="other"), 0),
    ],
)
def test_what_is_found(first: Sequence, second: Sequence, found: int) -> None:
    memory = Memory()
    assert memory.use(first) == 0
    assert memory.use(second) == found
    assert (first.num_cached, second.num_cached) == (0, found)
    queried = len(first.prompt_token_ids) + len(second.prompt_token_ids)
    assert (memory.kv.stats.num_queried, memory.kv.stats.num_found) == (queried, found)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    memory = Memory()
    first = asked(LONG[:6], "a")
    memory.start(first)
    for token in range(50, 57):
        assert memory.kv.grow(first, first.num_tokens) is not None
        first.num_computed = first.num_tokens
        memory.kv.commit(first)
        first.output_token_ids.append(token)
    memory.release(first)  # the last token was drawn, not computed
    assert memory.use(asked([*LONG[:6], *range(50, 57), 1, 2, 3], "a")) == 12


def test_drafts_that_were_confirmed_last_are_found_too() -> None:
    memory = Memory()
    first = asked(LONG[:8])
    memory.start(first)
    first.output_token_ids += [50]
    assert memory.kv.grow(first, 12) is not None
    first.num_computed = 12  # with drafts 51, 52 and 53, which are its tokens only hereafter
    memory.kv.commit(first)
    first.output_token_ids += [51, 52, 53, 54]
    memory.release(first)
    assert memory.use(asked([*LONG[:8], 50, 51, 52, 53, 1])) == 12


def test_blocks_are_shared_not_copied() -> None:
    memory = Memory()
    first, second = asked(LONG), asked([*LONG, 1, 2])
    memory.start(first)
    memory.start(second)
    assert second.block_table[:5] == first.block_table
    assert memory.arena.count(Use.KV) == 6
    memory.release(first)
    assert (memory.arena.count(Use.KV), memory.arena.count(Use.CACHED)) == (6, 0)
    memory.release(second)
    assert (memory.arena.count(Use.KV), memory.arena.count(Use.CACHED)) == (0, 5)


def test_of_two_that_computed_the_same_one_copy_stays() -> None:
    memory = Memory()
    twins = [asked(LONG), asked(LONG)]
    for twin in twins:
        assert memory.kv.start(twin, 0, ())
        memory.running.append(twin)
    for twin in twins:
        twin.num_computed = 18
        memory.kv.commit(twin)
        memory.check()
    assert twins[0].block_table[:4] == twins[1].block_table[:4]
    assert twins[0].block_table[4] != twins[1].block_table[4]
    assert memory.arena.count(Use.KV) == 6


def test_one_that_is_behind_takes_over_what_others_computed() -> None:
    memory = Memory()
    behind = asked(LONG)
    assert memory.kv.start(behind, 0, ())
    memory.running.append(behind)
    behind.num_computed = 5
    memory.kv.commit(behind)
    memory.use(asked(LONG[:14]))
    memory.kv.catch_up(behind)
    memory.check()
    assert (behind.num_computed, behind.num_cached) == (12, 7)


def test_one_that_had_to_give_way_finds_its_own_blocks() -> None:
    memory = Memory()
    sequence = asked(LONG)
    memory.start(sequence)
    sequence.output_token_ids += [1, 2, 3, 4]
    memory.release(sequence)
    assert memory.start(sequence) == 20
    assert sequence.num_cached == 0  # when it came, nothing was there


def test_no_room_changes_nothing_and_what_is_found_is_no_room() -> None:
    memory = Memory(num_blocks=8)
    memory.use(asked(LONG))
    other = asked([60, 61, 62, 63])
    memory.start(other)
    shown = repr(memory.arena)
    assert shown == "Arena(8 blocks: 1 kv, 5 cached, 0 adapter, 2 free)"
    assert not memory.kv.start(asked([*LONG, *range(30, 40)]), 0, ())
    assert repr(memory.arena) == shown
    assert memory.start(asked([*LONG, *range(30, 38)])) == 20
    assert memory.arena.num_free == 0


def test_one_that_waits_finds_what_came_and_not_what_went() -> None:
    memory = Memory(num_blocks=8)
    waits, holder = asked([*LONG, 1]), asked([60] * 12)
    memory.use(asked(LONG[:9]))
    memory.start(holder)
    assert not memory.kv.start(waits, 4, ())  # there are not so many slots
    memory.release(holder)
    assert memory.pool.make_room(8) == ()
    memory.use(asked(LONG[:13]))
    assert not memory.kv.start(waits, 5, ())
    assert memory.start(waits) == 12


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    memory = Memory(num_blocks=10)
    memory.use(asked(LONG))
    memory.use(asked([*LONG[:8], *range(60, 72)]))
    for num_blocks, first, second in [(3, 16, 16), (4, 12, 16), (7, 8, 12), (9, 4, 4)]:
        assert memory.pool.make_room(num_blocks) == ()
        memory.check()
        assert found(memory, asked(LONG)) == first
        assert found(memory, asked([*LONG[:8], *range(60, 72)])) == second


def found(memory: Memory, sequence: Sequence) -> int:
    """A look that counts as no use."""
    return SIZE * len(memory.kv._seek(sequence))


@pytest.mark.parametrize(
    ("uses", "room", "gone", "left"),
    [
        ("aPb", 5, "", "ab-"),  # found by nobody: it ages quickly
        ("abbbbbP", 5, "a", "bP"),
        ("PPab", 5, "a", "bP"),  # found: it ages slowly
        ("aPPbbbbbba", 5, "", "ab-"),
        ("aPPbbbbbba", 6, "b", "a-"),  # of the prefix only as much as is missing
        ("abPP", 9, "ab", "P"),
        ("Pab", 9, "a", "b-"),
        ("PPAb", 9, "b", "a-"),  # awaited: last
        ("PPAB", 9, "a", "b-"),
    ],
)
def test_what_gives_way_first(uses: str, room: int, gone: str, left: str) -> None:
    """Adapters of four blocks each, a prefix of four; capitals are awaited, P is the prefix."""
    memory = Memory(num_blocks=13)
    memory.load("a", 4)
    memory.load("b", 4)
    for each in uses:
        if each == "P":
            memory.use(asked(LONG[:17]))
        else:
            memory.touch(each.lower())
    memory.pool.awaited = {each.lower() for each in uses if each in "AB"}
    assert memory.pool.room(()).blocks == 13
    assert "".join(sorted(memory.pool.make_room(room) or ())) == gone
    memory.check()
    here = "".join(version for version in "ab" if memory.pool.get(version) is not None)
    whole = found(memory, asked(LONG[:17])) == 16
    assert here + ("P" if whole else "-") == left


def test_kv_of_a_version_that_nobody_can_ask_for_goes() -> None:
    memory = Memory()
    memory.load("a", 2)
    memory.use(asked(LONG, "a", start=8))
    memory.use(asked(LONG, "a+b"))
    memory.use(asked(LONG, "b"))
    memory.pool.acquire("a")
    running = asked([*LONG, 1], "a", start=8)
    memory.start(running)
    memory.pool.forget("a")
    memory.check()
    assert found(memory, asked(LONG, "a+b")) == 16  # until its last use ends
    memory.release(running)
    memory.pool.release("a")
    memory.check()
    assert found(memory, asked(LONG, "a+b")) == found(memory, asked(LONG, "a")) == 0
    assert found(memory, asked(LONG, "b")) == 16
    assert found(memory, asked(LONG)) == 8


def test_nobody_begins_with_what_gave_no_finite_logits() -> None:
    """Those who hold some of it keep that, add nothing that is found, and take it with them."""
    memory = Memory()
    sick, reader, idle = asked(LONG), asked([*LONG[:8], *range(70, 76)]), asked([*LONG, 1])
    memory.start(sick)
    memory.start(reader)
    memory.use(idle)
    memory.running.remove(sick)
    memory.kv.discard(sick)
    memory.check()
    assert (memory.arena.count(Use.KV), memory.arena.count(Use.CACHED)) == (4, 0)
    fresh = asked(LONG)
    assert memory.start(fresh) == 0
    reader.output_token_ids += range(80, 84)
    assert memory.kv.grow(reader, reader.num_tokens) is not None
    memory.kv.catch_up(reader)
    reader.num_computed = reader.num_tokens
    memory.kv.commit(reader)
    memory.release(reader)
    memory.release(fresh)
    assert found(memory, asked(LONG)) == 16  # computed anew
    assert found(memory, asked([*LONG[:8], *range(70, 76)])) == 8
    assert memory.arena.num_free == 95


def test_without_it_nothing_is_kept() -> None:
    memory = Memory()
    memory.kv = KVMemory(memory.arena, memory.pool, SIZE)
    assert [memory.use(asked(LONG)), memory.use(asked(LONG))] == [0, 0]
    assert memory.arena.num_free == 100
