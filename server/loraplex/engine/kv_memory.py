"""Arena blocks for the KV of sequences. Pure: numbers of blocks, no bytes."""

from collections.abc import Collection, Iterable

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.arena import Arena, Use
from loraplex.engine.sequence import Sequence


class KVMemory:
    """What sequences hold of the arena; the pool's idle adapters make room for them."""

    def __init__(self, arena: Arena, pool: AdapterPool, block_tokens: int) -> None:
        self._arena = arena
        self._pool = pool
        self._block_tokens = block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def start(self, sequence: Sequence, num_slots: int, keep: Collection[str]) -> bool:
        """Blocks for all tokens that a waiting sequence has, and so many free slots beside them.

        False, and nothing changed, if there is no room without the versions of `keep`.
        """
        num_blocks = self.blocks_for(sequence.num_tokens)
        if self._pool.make_room(num_blocks, num_slots, keep) is None:
            return False
        sequence.block_table = self._allocate(num_blocks)
        return True

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

    def commit(self, sequence: Sequence) -> None:
        """`num_computed` of a running sequence has grown."""

    def release(self, sequence: Sequence) -> None:
        """Give all its blocks back; its KV has to be computed anew."""
        self._arena.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        held = sum(len(sequence.block_table) for sequence in running)
        assert held == self._arena.count(Use.KV), "KV blocks and running sequences disagree"

    def _allocate(self, num_blocks: int) -> list[int]:
        blocks = self._arena.allocate(num_blocks, Use.KV)
        assert blocks is not None, "room was made that is not there"
        return blocks
