"""The block allocator behind the one device buffer that KV and adapters share."""

from collections import Counter
from collections.abc import Iterable
from enum import Enum


class Use(Enum):
    """What a block in use holds."""

    KV = "kv"
    ADAPTER = "adapter"


class Arena:
    """Equal blocks of device memory, handed out by number. Knows no bytes and no device.

    Mutable: `_free`, the stack of free blocks, `_use`, what each other block is for, and `_counts`,
    how many of each there are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._use: dict[int, Use] = {}
        self._counts = Counter[Use]()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, use: Use) -> int:
        return self._counts[use]

    def allocate(self, count: int, use: Use) -> list[int] | None:
        """`count` blocks, or None and nothing changed when so many are not free."""
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._use.update(dict.fromkeys(blocks, use))
        self._counts[use] += count
        return blocks

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
        return f"Arena({self.num_blocks} blocks: {kv} kv, {adapter} adapter, {self.num_free} free)"
