"""Blocks arrive whole, whatever order a device runs its work in; a stand-in device tells."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex.engine.transfer import BlockCopier, Copier, PlainCopier, copier_for
from torch import Tensor

from tests.server.engine.lazy_streams import LazyCopyStream, LazyDevice, LazyEvent

BLOCK_BYTES = 8
NUM_BLOCKS = 24
CHANCES = st.lists(st.integers(0, 3), max_size=8)


def arena() -> Tensor:
    return torch.full((NUM_BLOCKS, BLOCK_BYTES), 255, dtype=torch.uint8)


def adapter(number: int, num_blocks: int) -> Tensor:
    """Every byte tells which adapter and which block it belongs to."""
    numbers = torch.arange(num_blocks, dtype=torch.uint8) + 16 * number
    return numbers[:, None].repeat(1, BLOCK_BYTES)


def adapter_in(stream: LazyCopyStream, number: int, num_blocks: int, is_pinned: bool) -> Tensor:
    made = adapter(number, num_blocks)
    if not is_pinned:
        return made
    return stream.pinned(made.numel()).view(made.shape).copy_(made)


def lazy(chance: list[int] | None = None) -> LazyCopyStream:
    device = LazyDevice(chance)
    return LazyCopyStream(device.stream(), device.stream())


@given(
    chance=CHANCES,
    num_staging=st.integers(1, 4),
    adapters=st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=3),
)
def test_blocks_have_landed_when_copy_returns(
    chance: list[int], num_staging: int, adapters: list[tuple[int, bool]]
) -> None:
    stream, blocks, places = lazy(chance), arena(), iter(range(NUM_BLOCKS - 1, -1, -1))
    copier = BlockCopier(stream, BLOCK_BYTES, num_staging)
    expected = arena()
    for number, (size, is_pinned) in enumerate(adapters):
        source = adapter_in(stream, number, size, is_pinned)
        chosen = [next(places) for _ in range(size)]
        copier.copy(source, [blocks[place] for place in chosen])
        expected[chosen] = source
        assert torch.equal(blocks, expected)


@settings(max_examples=25, deadline=None)
@given(chance=CHANCES, num_staging=st.integers(1, 4))
def test_two_threads_share_the_pinned_blocks(chance: list[int], num_staging: int) -> None:
    blocks = arena()
    copier = BlockCopier(lazy(chance), BLOCK_BYTES, num_staging)

    def load(number: int) -> bool:
        source, mine = adapter(number, 8), blocks[8 * number : 8 * number + 8]
        copier.copy(source, mine)
        return torch.equal(mine, source)

    with ThreadPoolExecutor(2) as workers:
        assert list(workers.map(load, range(3))) == [True] * 3


@given(chance=CHANCES, is_pinned=st.booleans())
def test_steps_given_before_still_find_what_they_read(chance: list[int], is_pinned: bool) -> None:
    """A block is given away while a step that reads or writes it has only been queued."""
    stream, blocks = lazy(chance), arena()
    seen: list[Tensor] = []
    stream.compute.give(lambda: seen.append(blocks[:4].clone()))
    stream.compute.give(lambda: blocks[:4].fill_(7))
    BlockCopier(stream, BLOCK_BYTES, 2).copy(adapter_in(stream, 1, 4, is_pinned), blocks[:4])
    stream.compute.finish(2)
    assert torch.equal(seen[0], arena()[:4])
    assert torch.equal(blocks[:4], adapter(1, 4))


def test_a_failed_copy_leaves_nothing_on_its_way() -> None:
    """Its blocks go to somebody else next, and its pinned ones serve the next adapter."""
    stream, blocks = lazy(), arena()
    copier = BlockCopier(stream, BLOCK_BYTES, 1)

    def torn() -> Iterator[Tensor]:
        yield from adapter(1, 2)
        raise OSError("the disk failed")

    with pytest.raises(OSError, match="the disk failed"):
        copier.copy(torn(), blocks[:3])
    blocks.zero_()
    copier.copy(adapter(2, 3), blocks[3:6])
    assert torch.equal(blocks[3:6], adapter(2, 3))
    assert not blocks[:3].any()


def test_what_is_pinned_goes_over_without_another_copy() -> None:
    """And so needs none of the pinned blocks, which stay for those that do."""
    stream, blocks = lazy(), arena()
    copier = BlockCopier(stream, BLOCK_BYTES, 1)
    source = adapter_in(stream, 1, 4, is_pinned=True)
    copier.copy(source, blocks[:4])
    assert stream.stream.num_given == 1 + 4  # to wait for the steps, then a copy a block
    assert torch.equal(blocks[:4], source)


def test_as_many_blocks_as_places() -> None:
    copiers: tuple[Copier, ...] = (PlainCopier(), BlockCopier(lazy(), BLOCK_BYTES))
    for copier in copiers:
        with pytest.raises(ValueError, match="shorter"):
            copier.copy(adapter(0, 3), arena()[:2])


def test_on_the_host_a_copy_is_a_copy() -> None:
    blocks = arena()
    copier = copier_for(torch.device("cpu"), BLOCK_BYTES)
    copier.copy(adapter(1, 3), blocks[3:6])
    assert torch.equal(blocks[3:6], adapter(1, 3))
    assert bool((blocks[6:] == 255).all())


class _NeverWaits(LazyEvent):
    def synchronize(self) -> None:
        pass


class _Deaf(LazyCopyStream):
    def record(self) -> LazyEvent:
        return _NeverWaits(self.stream, self.stream.num_given)


class _Hasty(LazyCopyStream):
    def after_steps(self) -> None:
        pass


def test_the_stand_in_shows_events_not_waited_for() -> None:
    """What the tests above rest on: without waits nothing has landed, and then the wrong bytes."""
    device, blocks = LazyDevice(), arena()
    stream = _Deaf(device.stream(), device.stream())
    BlockCopier(stream, BLOCK_BYTES, 2).copy(adapter(1, 4), blocks[:4])
    assert torch.equal(blocks, arena())
    device.synchronize()
    assert blocks[:4, 0].tolist() == [18, 19, 18, 19]


def test_the_stand_in_shows_copies_that_do_not_wait_for_steps() -> None:
    device, blocks = LazyDevice(), arena()
    stream = _Hasty(device.stream(), device.stream())
    stream.compute.give(lambda: blocks[:4].fill_(7))
    BlockCopier(stream, BLOCK_BYTES, 2).copy(adapter(1, 4), blocks[:4])
    device.synchronize()
    assert bool((blocks[:4] == 7).all())
