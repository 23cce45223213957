"""The block allocator behind the one device buffer that KV and adapters share."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum


class Use(Enum):
    """What a block in use holds."""

    KV = "kv"
    CACHED = "cached"  # KV that no running sequence reads
    ADAPTER = "adapter"


class Arena:
    """Equal blocks of device memory, handed out by number. Knows no bytes and no device.

    Mutable: `_free`, the stack of free blocks, `_use`, what each other block is for, `_counts`, how
    many of each there are, and `num_uses`, of all that lies here, which tells what was used last.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._use: dict[int, Use] = {}
        self._counts = Counter[Use]()
        self.num_uses = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, use: Use) -> int:
        return self._counts[use]

    def use_of(self, block: int) -> Use | None:
        """None: it is free."""
        return self._use.get(block)

    def next_use(self) -> int:
        """Its number."""
        self.num_uses += 1
        return self.num_uses

    def allocate(self, count: int, use: Use) -> list[int] | None:
        """`count` blocks, or None and nothing changed when so many are not free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._use.update(dict.fromkeys(blocks, use))
        self._counts[use] += count
        return blocks

    def turn(self, block: int, use: Use) -> None:
        """From now on this block, which is not free, is for something else."""
        self._counts[self._use[block]] -= 1
        self._use[block] = use
        self._counts[use] += 1

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._counts[self._use.pop(block)] -= 1
            self._free.append(block)

    def check_integrity(self) -> None:
        """Every block is free or in use, once."""
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert not self._use.keys() & set(self._free), "a block is free and in use"
        assert len(self._free) + len(self._use) == self.num_blocks, "a block is lost"
        assert +self._counts == Counter(self._use.values()), "blocks are miscounted"

    def __repr__(self) -> str:
        kv, adapter = self.count(Use.KV), self.count(Use.ADAPTER)
        cached = f" {self.count(Use.CACHED)} cached," if self.count(Use.CACHED) else ""
        used = f"{kv} kv,{cached} {adapter} adapter"
        return f"Arena({self.num_blocks} blocks: {used}, {self.num_free} free)"
