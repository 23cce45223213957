"""KV that is kept for whoever begins with the same tokens. Pure: no device, no clock.

A full block is found again by its `Key`: the block before it (for the first one: the tenant), the
adapter that acted on its tokens, and the tokens. So a chain of keys says all that its KV was made
of. Keys are compared in full: no hash stands for content, and nothing is shared between tenants, as
the time to the first token tells whether a prefix was there (CVE-2025-46570).

An activated adapter (aLoRA) leaves the tokens before its start to the base: blocks wholly before it
have the base's keys, and are everybody's; the one that the start falls into has a key of its own.

    held       by running sequences, that only read it; so are all blocks before it in the chain
    idle       by nobody; it stays until its room is wanted
    discarded  held, but never found again; it goes with the last who holds it

Most prompts are never seen again, but a prefix that was found once is likely to be found once more,
and costs far more to compute than an adapter of the same size to copy. So the age of an idle block,
by which it goes, counts more than an adapter's until somebody has found it, and less from then on.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import merge
from itertools import count, islice
from operator import itemgetter

from loraplex.engine.arena import Arena, Use
from loraplex.engine.sequence import Sequence

UNFOUND_AGES, FOUND_AGES = 4.0, 0.25
"""So many times as quickly as an adapter. By simulation (closed loops of random prompts, shared
prefixes, conversations and all of these, Zipf over more adapters than fit): beside one order of
plain ages, a sixth fewer adapter loads where prompts are random, and an eighth less to compute
where prefixes are shared."""

Acting = tuple[str, int]
"""An adapter's version or a blend's identity, and the first of the block's tokens it acts on."""

Key = tuple[int | str, Acting | None, bytes]
"""The number of the block's parent or, without one, the tenant; who acts; int32 token ids."""


@dataclass(slots=True, eq=False)
class Node:
    """A full block and what it holds. Mutable: the second part."""

    number: int  # never used again
    key: Key
    parent: "Node | None"
    block: int
    versions: tuple[str, ...]  # adapter versions that acted on its tokens

    references: int = 0
    was_found: bool = False  # again, by a sequence that had not computed it
    last_use: int = 0  # of the arena, when it became idle
    is_cached: bool = True  # can be found


class PrefixCache:
    """Mutable: `_nodes`, parents before children; `_by_block`, these and the discarded ones; and
    those that are idle, the oldest first: `_unfound`, of use to nobody but who computed them, and
    `_found`.

    A child is never idle for less long than its parent, and was never found where its parent was
    not: so children come before their parents in the order in which blocks go.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._numbers = count()
        self._nodes: dict[Key, Node] = {}
        self._by_block: dict[int, Node] = {}
        self._unfound: OrderedDict[int, Node] = OrderedDict()
        self._found: OrderedDict[int, Node] = OrderedDict()

    def at(self, block: int) -> Node | None:
        return self._by_block.get(block)

    def find(self, key: Key) -> Node | None:
        return self._nodes.get(key)

    def insert(self, key: Key, parent: Node | None, block: int, versions: tuple[str, ...]) -> Node:
        """A block that a sequence has filled; it goes on holding it."""
        node = Node(next(self._numbers), key, parent, block, versions, references=1)
        assert key not in self._nodes, "the same KV is kept twice"
        assert block not in self._by_block, "a block is kept for two keys"
        self._nodes[key] = self._by_block[block] = node
        return node

    def acquire(self, node: Node) -> None:
        """One more sequence reads it, and has all that come before it in the chain."""
        if not node.references:
            self._idle(node).pop(node.block)
            self._arena.turn(node.block, Use.KV)
        node.references += 1
        node.was_found = True

    def release(self, nodes: Seq[Node]) -> None:
        """One sequence less; they are a whole chain, from its first block on."""
        now = self._arena.next_use()
        for node in reversed(nodes):
            assert node.references > 0, "a block is released more often than acquired"
            node.references -= 1
            if node.references:
                continue
            if not node.is_cached:
                self._free(node)
                continue
            node.last_use = now
            self._idle(node)[node.block] = node
            self._arena.turn(node.block, Use.CACHED)

    # What gives way.

    @property
    def num_idle(self) -> int:
        return len(self._unfound) + len(self._found)

    def idle_uses(self) -> Iterator[float]:
        """For each idle block, in the order in which they go: when an adapter of its age was used.

        In uses of the arena.
        """
        return (use for use, _ in self._in_order())

    def evict(self, num_blocks: int) -> None:
        for _, node in list(islice(self._in_order(), num_blocks)):
            self._drop(node)

    def _in_order(self) -> Iterator[tuple[float, Node]]:
        now = self._arena.num_uses

        def aged(nodes: OrderedDict[int, Node], factor: float) -> Iterator[tuple[float, Node]]:
            return ((now - factor * (now - node.last_use), node) for node in nodes.values())

        unfound, found = aged(self._unfound, UNFOUND_AGES), aged(self._found, FOUND_AGES)
        return merge(unfound, found, key=itemgetter(0))  # of equal ones the former first

    def forget(self, version: str) -> None:
        """Nobody will ask for this adapter version again."""
        nodes = self._nodes.values()
        for node in [n for n in nodes if version in n.versions and not n.references]:
            self._drop(node)

    def discard(self, nodes: Collection[Node]) -> None:
        """These are not to be trusted, nor what was computed after them: nobody finds them again.

        Whoever holds them keeps them.
        """
        gone = {node.number for node in nodes if node.is_cached}
        for node in self._nodes.values():
            if node.parent is not None and node.parent.number in gone:
                gone.add(node.number)
        for node in [node for node in self._nodes.values() if node.number in gone]:
            if not node.references:
                self._drop(node)
                continue
            del self._nodes[node.key]
            node.is_cached = False

    def clear(self) -> None:
        """All that is idle."""
        self.evict(self.num_idle)

    def _drop(self, node: Node) -> None:
        """One that is idle."""
        del self._idle(node)[node.block], self._nodes[node.key]
        node.is_cached = False
        self._free(node)

    def _free(self, node: Node) -> None:
        del self._by_block[node.block]
        self._arena.free([node.block])

    def _idle(self, node: Node) -> OrderedDict[int, Node]:
        return self._found if node.was_found else self._unfound

    def check_integrity(self, held: "Counter[Node]") -> None:
        """`held`: how many running sequences hold each."""
        nodes, kept = self._nodes.values(), self._by_block.values()
        assert held == Counter({n: n.references for n in kept if n.references}), "miscounted"
        assert set(nodes) == {node for node in kept if node.is_cached}, "keys and blocks disagree"
        assert all(node.is_cached or node.references for node in kept), "discarded, and kept"
        idle = [node for _, node in self._in_order()]
        assert set(idle) == {node for node in nodes if not node.references}, "idle or not"
        assert len(idle) == self._arena.count(Use.CACHED), "cached blocks are miscounted"
        places = {node: place for place, node in enumerate(idle)}
        for key, node in self._nodes.items():
            assert (key, self._by_block[node.block]) == (node.key, node), "filed under another key"
            assert self._arena.use_of(node.block) is (Use.KV if node.references else Use.CACHED)
            if (parent := node.parent) is not None:
                assert parent.is_cached, "a block outlived its parent"
                assert parent.references >= node.references, "held without its parent"
                assert places.get(node, -1) < places.get(parent, len(idle)), "goes after its parent"


def key_of(sequence: Sequence, start: int, end: int, parent: Node | None) -> Key:
    """Of the block that holds exactly these of its tokens, whose parent is given."""
    token_ids = sequence.token_ids(start, end)
    assert len(token_ids) == end - start, "a block of tokens that are not there"
    before: int | str = sequence.tenant if parent is None else parent.number
    return before, acting(sequence, start, end), array("i", token_ids).tobytes()


def acting(sequence: Sequence, start: int, end: int) -> Acting | None:
    """Who acts on these of its tokens; None: the base alone made their KV."""
    first = max(0, sequence.adapter_start - start)
    if sequence.digest is None or first >= end - start:
        return None
    return sequence.digest, first
