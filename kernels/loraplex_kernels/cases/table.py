"""The list of cases, and the bytes that each must move."""

from collections.abc import Iterator, Sequence
from itertools import compress

import torch

from loraplex_kernels.cases.adapters import Bank, Ranks, Scaled, adapter_bytes
from loraplex_kernels.cases.attention import PreparedAttention
from loraplex_kernels.cases.elementwise import PreparedNorm, PreparedRotary, PreparedSilu
from loraplex_kernels.cases.linear import PreparedLinear, PreparedLora, PreparedScale
from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.cases.prepared import Case
from loraplex_kernels.cases.shapes import SERVING, LinearShape, ModelShapes, Scale
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.nf4 import BLOCK_SIZE
from loraplex_kernels.segments import LONG_TILE_ROWS, NO_ADAPTER

NUM_SLOTS = 8


def cases(
    shapes: ModelShapes,
    device: torch.device,
    dtype: torch.dtype,
    max_rank: int = 64,
    scale: Scale = SERVING,
    fill: bool = True,
) -> Iterator[Case]:
    """Every op of `gpu.ops.KERNELS` over a model's shapes, as decode and as prefill meet it."""
    make = CaseMaker(shapes, device, dtype, max_rank, fill)
    decode, prefill = scale.decode_rows[-1], scale.prefill_rows
    linears = [linear for linear in shapes.linears if linear.name in scale.linears]
    yield make.add_rms_norm(decode)
    yield make.add_rms_norm(1, has_delta=False)
    yield make.add_rms_norm(prefill)
    yield make.rotary_and_cache(decode)
    yield make.rotary_and_cache(prefill)
    yield from _attention_cases(make, scale)
    yield make.silu_mul(decode)
    yield make.silu_mul(prefill)
    for linear in linears:
        for slots in (mixed_slots(decode), prefill_slots(prefill)):
            yield make.lora(linear, mixed_ranks(linear, max_rank), slots)
            yield make.scale_output(linear, mixed_scaled(linear), slots)
    for linear in linears:
        for rows in scale.decode_rows:
            for slots in ([NO_ADAPTER] * rows, mixed_slots(rows)):
                yield make.nf4_linear(linear, mixed_ranks(linear, max_rank), slots)
        yield make.nf4_linear(linear, mixed_ranks(linear, max_rank), [NO_ADAPTER] * prefill)


def _attention_cases(make: "CaseMaker", scale: Scale) -> Iterator[Case]:
    context, prefill = scale.context, scale.prefill_rows
    for rows in scale.decode_rows:
        yield make.attention(f"decode at {context}", [(context, 1)] * rows)
    block = make.shapes.block_tokens
    odd_contexts = (1, 2, block - 1, block, block + 1, 2 * block + 1, context - 1, context)
    odd = [(min(n, context), 1) for n in odd_contexts]
    yield make.attention("decode, padded", [*odd, (0, 1)])
    yield make.attention("prefill", [(prefill, prefill)])
    part = prefill // 2
    chunks = [(part + 7, part), (part, 9), (5, 5)]
    yield make.attention("decode and chunks", [*odd, *chunks])
    yield make.attention("in a window", [*odd, *chunks], window=max(context // 4, 5))


class CaseMaker:
    """Cases of one model on one device, by op."""

    def __init__(
        self,
        shapes: ModelShapes,
        device: torch.device,
        dtype: torch.dtype,
        max_rank: int,
        fill: bool = True,
    ) -> None:
        self.shapes = shapes
        self._device = device
        self._dtype = dtype
        self.max_rank = max_rank
        self._fill = fill

    def _memory(self, form: GranuleForm) -> Memory:
        return Memory(self._device, self._dtype, self._fill, form)

    def _bank(self, ranks: Ranks) -> Bank:
        return Bank(ranks, self.max_rank, self.shapes.num_layers)

    def _scales(self, linear: LinearShape, scaled: Scaled) -> Bank:
        """Of adapters that have nothing else: the op reads nothing else."""
        ranks = [[0] * len(linear.projections)] * len(scaled)
        return self._bank(ranks)._replace(scaled=scaled)

    def add_rms_norm(self, rows: int, has_delta: bool = True) -> Case:
        hidden = self.shapes.hidden_size
        residual = (8 if has_delta else 4) * rows * hidden
        moved = residual + (1 + has_delta) * rows * hidden * self._dtype.itemsize + 4 * hidden
        return Case(
            "add_rms_norm",
            "with delta" if has_delta else "first",
            rows,
            moved,
            lambda form: PreparedNorm(self._memory(form), hidden, rows, has_delta),
        )

    def rotary_and_cache(self, rows: int) -> Case:
        shapes = self.shapes
        q, kv = shapes.num_heads * shapes.head_dim, shapes.num_kv_heads * shapes.head_dim
        elements = 2 * (q + kv) + kv + 2 * kv  # q, k turned in place; v read; k, v written
        moved = rows * (elements * self._dtype.itemsize + 4 * shapes.head_dim + 8)
        return Case(
            "rotary_and_cache",
            "rows",
            rows,
            moved,
            lambda form: PreparedRotary(self._memory(form), shapes, rows),
        )

    def attention(
        self, name: str, sequences: Sequence[tuple[int, int]], window: int | None = None
    ) -> Case:
        """`sequences` are (context, queries), those of one query first; context 0 is padding."""
        shapes = self.shapes
        rows = sum(queries for _, queries in sequences)
        keys = sum(
            min(context, window + queries - 1) if window else context
            for context, queries in sequences
        )
        elements = 2 * rows * shapes.num_heads + 2 * keys * shapes.num_kv_heads
        return Case(
            "attention",
            name,
            rows,
            elements * shapes.head_dim * self._dtype.itemsize,
            lambda form: PreparedAttention(self._memory(form), shapes, sequences, window),
        )

    def silu_mul(self, rows: int) -> Case:
        inter = self.shapes.intermediate_size
        return Case(
            "silu_mul",
            "rows",
            rows,
            3 * rows * inter * self._dtype.itemsize,
            lambda form: PreparedSilu(self._memory(form), inter, rows),
        )

    def lora(self, linear: LinearShape, ranks: Ranks, slots: Sequence[int]) -> Case:
        """`ranks[slot][projection]`, and each row's slot."""
        itemsize = self._dtype.itemsize
        moved = adapter_bytes(linear, ranks, slots, itemsize)
        for slot in slots:
            if slot != NO_ADAPTER and any(ranks[slot]):
                widths = zip(linear.projections, ranks[slot], strict=True)
                written = sum(projection.width for projection, rank in widths if rank)
                moved += (linear.in_features + 2 * written) * itemsize
        return Case(
            "lora",
            f"{linear.name}, {_adapters(slots)}",
            len(slots),
            moved,
            lambda form: PreparedLora(self._memory(form), linear, self._bank(ranks), slots),
        )

    def scale_output(self, linear: LinearShape, scaled: Scaled, slots: Sequence[int]) -> Case:
        """`scaled[slot][projection]`, and each row's slot."""
        widths = [[p.width for p in compress(linear.projections, own)] for own in scaled]
        used = [slot for slot in slots if slot != NO_ADAPTER]
        elements = sum(sum(widths[slot]) for slot in used)
        factors = sum(sum(widths[slot]) for slot in {*used})
        return Case(
            "scale_output",
            f"{linear.name}, {_adapters(slots)}",
            len(slots),
            2 * elements * self._dtype.itemsize + 4 * factors,
            lambda form: PreparedScale(
                self._memory(form), linear, self._scales(linear, scaled), slots
            ),
        )

    def nf4_linear(self, linear: LinearShape, ranks: Ranks, slots: Sequence[int]) -> Case:
        itemsize = self._dtype.itemsize
        weights = linear.in_features * linear.out_features
        moved = weights // 2 + 4 * weights // BLOCK_SIZE
        moved += len(slots) * (linear.in_features + linear.out_features) * itemsize
        moved += adapter_bytes(linear, ranks, slots, itemsize)
        return Case(
            "nf4_linear",
            f"{linear.name}, {_adapters(slots)}",
            len(slots),
            moved,
            lambda form: PreparedLinear(self._memory(form), linear, self._bank(ranks), slots),
        )


def mixed_slots(rows: int) -> list[int]:
    """Each row's slot, ascending: the base's rows first, then ever rarer adapters."""
    return [int(NUM_SLOTS * ((row + 1) / rows) ** 1.5) - 1 for row in range(rows)]


def prefill_slots(rows: int) -> list[int]:
    """A short segment, and long ones that begin anywhere."""
    slots = [NO_ADAPTER] * (rows // 16) + [0] * (rows // 24)
    rest = rows - len(slots)
    half = rest // 2 if rest > 2 * LONG_TILE_ROWS + 1 else 0
    return [*slots, *[2] * half, *[4] * (rest - half)]


def mixed_ranks(linear: LinearShape, max_rank: int) -> list[list[int]]:
    """Ranks from 1 to the largest; slots 3 and 5 leave out a module."""
    ranks = [
        [min(rank, max_rank)] * len(linear.projections)
        for rank in (16, 8, max_rank, 16, 33, 16, 1, max_rank)
    ]
    ranks[3][0] = 0
    ranks[5][-1] = 0
    return ranks


def mixed_scaled(linear: LinearShape) -> list[list[bool]]:
    """Slots 0 and 3 scale nothing; slots 2 and 5 leave out a module, where there is another."""
    scaled = [[slot not in (0, 3)] * len(linear.projections) for slot in range(NUM_SLOTS)]
    if len(linear.projections) > 1:
        scaled[2][0] = scaled[5][-1] = False
    return scaled


def _adapters(slots: Sequence[int]) -> str:
    count = len({*slots} - {NO_ADAPTER})
    return f"{count} adapter" if count == 1 else f"{count} adapters"
