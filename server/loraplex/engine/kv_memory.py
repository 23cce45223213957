"""Arena blocks for the KV of sequences, shared where they begin alike. Pure: no bytes, no clock.

What a sequence holds, in its block table:

    full blocks up to `num_computed`   the prefix cache's: read only, held by as many as have them
    all others                         its own, to be written

So no write ever meets a block that somebody else reads: a step writes from `num_computed` on, and
drafts that are not confirmed lie behind it. The last token is always computed, as its logits are
what the next one is drawn from.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.prefix_cache import Node, key_of
from loraplex.engine.sequence import Sequence


@dataclass(slots=True)
class PrefixStats:
    """Since the start, in tokens. Each request is counted once, however often it is admitted."""

    num_queried: int = 0  # of the prompts of those admitted
    num_found: int = 0  # of them, whose KV was there


class KVMemory:
    """What sequences hold of the arena; idle prefixes and adapters make room for them.

    Mutable: `stats`; `_sought`, who looked for its prefix last and what it found: one who waits for
    room asks at every step.
    """

    def __init__(
        self, arena: Arena, pool: AdapterPool, block_tokens: int, with_prefixes: bool = False
    ) -> None:
        """`with_prefixes`: keep the KV of full blocks for those who begin with the same tokens."""
        self._arena = arena
        self._pool = pool
        self._block_tokens = block_tokens
        self._with_prefixes = with_prefixes
        self._prefixes = pool.prefixes
        self._sought: tuple[Sequence, list[Node]] | None = None
        self.stats = PrefixStats()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def start(self, sequence: Sequence, num_slots: int, keep: Collection[str]) -> bool:
        """Blocks for all tokens that a waiting sequence has, and so many free slots beside them.

        Its `num_computed` says how many tokens are there already. False, and nothing changed, if
        there is no room without the versions of `keep`.
        """
        found = self._seek(sequence)
        num_blocks = self.blocks_for(sequence.num_tokens) - len(found)
        room = self._pool.room(keep)
        num_idle = sum(not node.references for node in found)  # and are not to make room
        if num_blocks > room.blocks - num_idle or num_slots > room.slots:
            return False
        for node in found:
            self._prefixes.acquire(node)
        is_there = self._pool.make_room(num_blocks, num_slots, keep) is not None
        assert is_there, "room was counted that is not there"
        sequence.block_table = [node.block for node in found] + self._allocate(num_blocks)
        sequence.num_computed = len(found) * self._block_tokens
        if sequence.admitted_at is None:
            self.stats.num_queried += len(sequence.prompt_token_ids)
            self._count(sequence, sequence.num_computed)
        self._sought = None
        return True

    def catch_up(self, sequence: Sequence) -> None:
        """Take over what others have computed meanwhile of a running sequence's next tokens.

        Of those who come together with one prefix the first computes it, and the others follow.
        """
        size, table = self._block_tokens, sequence.block_table
        first = sequence.num_computed // size
        parent = self._prefixes.at(table[first - 1]) if first else None
        if first and (parent is None or not parent.is_cached):
            return
        num_found = 0
        for node in self._follow(sequence, first, parent):
            self._share(sequence, first + num_found, node)
            num_found += 1
        if num_found:
            num_computed = (first + num_found) * size
            if not sequence.output_token_ids:
                self._count(sequence, num_computed - sequence.num_computed)
            sequence.num_computed = num_computed

    def grow(self, sequence: Sequence, num_tokens: int) -> tuple[str, ...] | None:
        """Blocks for so many tokens of a running sequence: the versions that went for them.

        None, and nothing changed, if there is no room.
        """
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return ()
        evicted = self._pool.make_room(missing)
        if evicted is not None:
            sequence.block_table += self._allocate(missing)
        return evicted

    def stretch(self, sequence: Sequence, num_tokens: int, num_left: int) -> bool:
        """Blocks for drafts of a running sequence, from what nobody uses; no adapter goes for them.

        False, and nothing changed, where fewer than `num_left` such blocks would be left.
        """
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        if missing + num_left > self._arena.num_free + self._prefixes.num_idle:
            return False
        self._prefixes.evict(max(0, missing - self._arena.num_free))
        sequence.block_table += self._allocate(missing)
        return True

    def commit(self, sequence: Sequence) -> None:
        """`num_computed` of a running sequence has grown: blocks that are full can be found.

        One that another sequence filled first takes the place of its own.
        """
        if not self._with_prefixes:
            return
        size, table = self._block_tokens, sequence.block_table
        # Beyond a stop token drafts may have been confirmed that are not the sequence's.
        num_full = min(sequence.num_computed, sequence.num_tokens) // size
        first = num_full
        while first and self._prefixes.at(table[first - 1]) is None:
            first -= 1
        parent = self._prefixes.at(table[first - 1]) if first else None
        if parent is not None and not parent.is_cached:  # nor is what comes after it
            return
        for index in range(first, num_full):
            key = key_of(sequence, index * size, (index + 1) * size, parent)
            node = self._prefixes.find(key)
            if node is None:
                versions = () if key[1] is None else sequence.versions
                node = self._prefixes.insert(key, parent, table[index], versions)
            else:
                self._share(sequence, index, node)
            parent = node

    def release(self, sequence: Sequence) -> None:
        """Let go of all its blocks; those that are full stay for others while there is room."""
        self.commit(sequence)
        self._let_go(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Let go of a running sequence's blocks, and keep none of them for others to find."""
        self._prefixes.discard(self._let_go(sequence))

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        held = Counter[Node]()
        own: list[int] = []
        for sequence in running:
            nodes = self._held(sequence)
            held.update(nodes)
            own += sequence.block_table[len(nodes) :]
            parents = [None, *nodes][: len(nodes)]
            assert [node.parent for node in nodes] == parents, "blocks of several chains"
            assert len(nodes) * self._block_tokens <= sequence.num_computed, "shared, and written"
        assert len(set(own)) == len(own), "two sequences write to one block"
        assert all(self._arena.use_of(block) is Use.KV for block in own), "not a block for KV"
        assert all(self._prefixes.at(block) is None for block in own), "a cached block is written"
        num_blocks = len(own) + len(held)
        assert num_blocks == self._arena.count(Use.KV), "KV blocks and running sequences disagree"
        self._prefixes.check_integrity(held)

    def _seek(self, sequence: Sequence) -> list[Node]:
        """The blocks that hold its first tokens, as far as there are any."""
        if not self._with_prefixes:
            return []
        known: list[Node] = []
        if self._sought is not None and self._sought[0] is sequence:
            known = self._sought[1]
            while known and not known[-1].is_cached:  # a block never outlives its parent
                known.pop()
        known += self._follow(sequence, len(known), known[-1] if known else None)
        self._sought = (sequence, known)
        return known

    def _follow(self, sequence: Sequence, index: int, parent: Node | None) -> Iterator[Node]:
        """Blocks that hold its tokens from its `index`-th block on, which comes after `parent`."""
        size = self._block_tokens
        for start in range(index * size, sequence.num_tokens - size, size):
            parent = self._prefixes.find(key_of(sequence, start, start + size, parent))
            if parent is None:
                return
            yield parent

    def _share(self, sequence: Sequence, index: int, node: Node) -> None:
        """Another's block with the same content takes the place of its own."""
        self._prefixes.acquire(node)
        self._arena.free([sequence.block_table[index]])
        sequence.block_table[index] = node.block

    def _held(self, sequence: Sequence) -> list[Node]:
        """The cache's blocks in its table: the first ones."""
        nodes = []
        for block in sequence.block_table:
            if (node := self._prefixes.at(block)) is None:
                break
            nodes.append(node)
        return nodes

    def _let_go(self, sequence: Sequence) -> list[Node]:
        """Of everything it has; those of the cache's blocks."""
        nodes = self._held(sequence)
        self._prefixes.release(nodes)
        self._arena.free(sequence.block_table[len(nodes) :])
        sequence.block_table = []
        sequence.num_computed = 0
        return nodes

    def _count(self, sequence: Sequence, num_found: int) -> None:
        num_found = min(num_found, len(sequence.prompt_token_ids) - sequence.num_cached)
        sequence.num_cached += num_found
        self.stats.num_found += num_found

    def _allocate(self, num_blocks: int) -> list[int]:
        blocks = self._arena.allocate(num_blocks, Use.KV)
        assert blocks is not None, "room was made that is not there"
        return blocks
