"""What never fits: beside what is pinned, or at all. Pure."""

from collections.abc import Callable

from loraplex.adapters.pool import AdapterPool
from loraplex.engine.sequence import Sequence
from loraplex.errors import RequestError

SizeOf = Callable[[str], int | None]
"""Blocks of a version that lies in host memory, ready to be copied; None: it does not."""

RETRY_SECONDS = 30.0
"""So long, about, until it is worth trying again what pins leave no room for: people unpin."""


def refusal(
    sequence: Sequence, num_blocks: int, pool: AdapterPool, size_of: SizeOf
) -> RequestError | None:
    """Why one that needs so many blocks for its KV never fits, as far as sizes are known."""
    versions = sequence.versions
    blocks = num_blocks + sum(pool.num_blocks_of(v) or size_of(v) or 0 for v in versions)
    slots = len(versions) + bool(sequence.blend)
    all_blocks, all_slots = pool.arena.num_blocks, pool.num_slots
    if blocks > all_blocks or slots > all_slots:
        if sequence.output_token_ids:
            return out_of_memory()
        return _exceeds_slots(slots, all_slots) if slots > all_slots else _exceeds_memory()
    pinned = pool.pinned_room(but=versions)
    if slots + pinned.slots > all_slots:
        return _pinned_away("too few slots (--max-slots)")
    if blocks + pinned.blocks > all_blocks:
        return _pinned_away("too little memory (--memory)")
    return None


def out_of_memory() -> RequestError:
    return RequestError(
        "OUT_OF_MEMORY", "the memory for KV and adapters is full and nothing else can give way"
    )


def _pinned_away(left: str) -> RequestError:
    return RequestError(
        "OUT_OF_MEMORY",
        f"the pinned adapters leave {left} for this request and its adapters",
        retry_after=RETRY_SECONDS,
    )


def _exceeds_memory() -> RequestError:
    return RequestError(
        "EXCEEDS_KV_CAPACITY",
        "the prompt and its adapters are larger than the memory for KV and adapters",
    )


def _exceeds_slots(needed: int, num_slots: int) -> RequestError:
    return RequestError(
        "EXCEEDS_KV_CAPACITY",
        f"the blend takes {needed} slots, one of them its own; there are {num_slots} (--max-slots)",
    )
