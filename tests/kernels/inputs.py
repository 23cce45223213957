"""Inputs for the ops' tests: adapters in an arena, sequences in a paged cache.

Both are NaN wherever an op has no business, so that a read too far shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.ops import AttentionInput, LoraInput, Projection
from loraplex_kernels.segments import NO_ADAPTER, segments_of
from loraplex_kernels.tables import AdapterTables, Granule, OutputScale, view
from torch import Tensor

CPU = torch.device("cpu")


def poison(num_bytes: int) -> Tensor:
    """Bytes that are NaN in every dtype."""
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


# LoRA: 6 adapters over 2 layers of 3 modules that stack into one linear.

K = 88
PROJECTIONS = (Projection(2, 0, 72), Projection(0, 72, 40), Projection(1, 112, 24))
N = 136
LAYERS, MODULES = 2, 3
RANKS = (  # of each slot's modules; 0: not adapted
    (16, 16, 16),
    (1, 17, 64),
    (0, 8, 0),
    (64, 64, 64),
    (4, 0, 33),
    (0, 0, 0),
)
SCALED = {1: (0, 1, 2), 2: (1,), 3: (2, 0), 5: (1,)}  # modules whose output a slot scales; layer 1


@dataclass(frozen=True)
class Bank:
    """Adapters in a poisoned arena, and their plain matrices."""

    projections: tuple[Projection, ...]
    arena: Tensor
    tables: AdapterTables
    dtype: torch.dtype
    form: GranuleForm
    matrices: dict[tuple[int, int, int], tuple[Tensor, Tensor, float]]  # A [r, K], B [n, r], scale
    output_scales: dict[tuple[int, int, int], Tensor]  # fp32 [n]

    def lora_input(self, slots: list[int]) -> LoraInput:
        segments = segments_of(slots)
        table = torch.tensor(segments, dtype=torch.int32).view(-1, 3)
        return LoraInput(
            arena=self.arena,
            dtype=self.dtype,
            form=self.form,
            tables=self.tables,
            has_adapters=bool(segments),
            has_output_scales=not self.tables.scaled_slots.isdisjoint(slots),
            segments=segments,
            segment_table=table,
            tiles=None,
        )

    def reference(self, y: Tensor, x: Tensor, slots: list[int], layer: int) -> Tensor:
        out = y.float().clone()
        for row, slot in enumerate(slots):
            for module, column, width in self.projections:
                if (slot, layer, module) in self.matrices:
                    a, b, scale = self.matrices[slot, layer, module]
                    out[row, column : column + width] += scale * (b @ (a @ x[row].float()))
        return out

    def scaled(self, y: Tensor, slots: list[int], layer: int) -> Tensor:
        out = y.float().clone()
        for row, slot in enumerate(slots):
            for module, column, width in self.projections:
                if (slot, layer, module) in self.output_scales:
                    factor = self.output_scales[slot, layer, module]
                    out[row, column : column + width] *= factor
        return out


def bank_of(
    dtype: torch.dtype,
    rng: torch.Generator,
    k: int = K,
    projections: tuple[Projection, ...] = PROJECTIONS,
    form: GranuleForm = GranuleForm.ROWS,
) -> Bank:
    widest = max(k, *(projection.width for projection in projections))
    room = -(-form.num_bytes(widest, dtype) // 64) * 64 + 64
    arena = poison(200 * room)
    tables = AdapterTables(len(RANKS), LAYERS, MODULES, 64, CPU)
    places = iter((torch.randperm(200, generator=rng) * room).tolist())
    matrices, output_scales = {}, {}
    for slot, ranks in enumerate(RANKS):
        granules: list[Granule] = []
        for layer in range(LAYERS):
            for module, _, width in projections:
                rank = ranks[module]
                if rank == 0:
                    continue
                a = torch.randn(rank, k, generator=rng).to(dtype).float()
                b = torch.randn(width, rank, generator=rng).to(dtype).float()
                scale = 0.1 + slot / 4
                matrices[slot, layer, module] = (a, b, scale)
                for part in range(-(-rank // GRANULE_RANK)):
                    a_at, b_at = next(places), next(places)
                    own = slice(part * GRANULE_RANK, (part + 1) * GRANULE_RANK)
                    form.write_a(arena, a_at, a[own].to(dtype))
                    form.write_b(arena, b_at, b.T[own].to(dtype))
                    granules.append(Granule(layer, module, part, a_at, b_at, scale))
        scales: list[OutputScale] = []
        for module, _, width in projections:
            if module in SCALED.get(slot, ()):
                factor = output_scales[slot, 1, module] = 2 * torch.rand(width, generator=rng) - 0.5
                scales.append(OutputScale(1, module, next(places)))
                view(arena, scales[-1].offset, 1, width, torch.float32).copy_(factor)
        tables.write(slot, granules, scales)
    return Bank(projections, arena, tables, dtype, form, matrices, output_scales)


def zipf(num_rows: int, rng: torch.Generator) -> list[int]:
    weights = torch.tensor([1 / (slot + 1) ** 1.5 for slot in range(len(RANKS))])
    return torch.multinomial(weights, num_rows, True, generator=rng).tolist()


def uniform(num_rows: int, rng: torch.Generator) -> list[int]:
    return torch.randint(0, len(RANKS), (num_rows,), generator=rng).tolist()


Popularity = Callable[[int, torch.Generator], list[int]]
POPULARITY: dict[str, Popularity] = {
    "distinct": lambda num_rows, _: list(range(min(num_rows, len(RANKS)))),
    "uniform": lambda num_rows, rng: sorted(uniform(num_rows, rng)),
    "zipf": lambda num_rows, rng: sorted(zipf(num_rows, rng)),
    "identical": lambda num_rows, _: [3] * num_rows,
    "skewed": lambda num_rows, _: [0, *[1] * (num_rows - 2), 4] if num_rows > 2 else [1],
    "none": lambda num_rows, _: [NO_ADAPTER] * num_rows,
    "some_without": lambda num_rows, rng: [s - 1 for s in sorted(uniform(num_rows, rng))],
    "unordered": uniform,
}


# Attention, over one layer's view into a cache that is NaN outside the sequences' own tokens.


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


BLOCK_TOKENS = 16
DECODES = [1, 2, 15, 16, 17, 33, 100]  # contexts
PREFILLS = [(2, 2), (16, 16), (40, 40), (33, 17), (48, 16), (50, 3)]  # (context, queries)


@dataclass(frozen=True)
class Paged:
    """Sequences in a poisoned cache: `k`, `v` [context, kv_heads, dim] are the cached of each."""

    qkv: Tensor
    k_cache: Tensor
    v_cache: Tensor
    where: AttentionInput
    k: list[Tensor]
    v: list[Tensor]


NO_TABLES = (torch.zeros(1, 1, dtype=torch.int32), None, None)


def paged(
    heads: Heads,
    dtype: torch.dtype,
    rng: torch.Generator,
    block_tokens: int = BLOCK_TOKENS,
    decodes: Sequence[int] = DECODES,
    prefills: Sequence[tuple[int, int]] = PREFILLS,
) -> Paged:
    contexts = [*decodes, *(context for context, _ in prefills)]
    queries = [1] * len(decodes) + [count for _, count in prefills]
    num_blocks = [-(-context // block_tokens) for context in contexts]
    cache = poison((sum(num_blocks) + 9) * 2 * 2 * heads.kv * block_tokens * heads.dim * 4)
    cache = cache.view(dtype)[: cache.numel() // 4]
    cache = cache.view(-1, 2, 2, heads.kv, block_tokens, heads.dim)  # as the arena: two layers
    k_cache, v_cache = cache[:, 1, 0], cache[:, 1, 1]
    shuffled = torch.randperm(cache.shape[0], generator=rng).tolist()
    tables = torch.zeros(len(contexts), max(num_blocks) + 1, dtype=torch.int32)
    k, v = [], []
    for index, context in enumerate(contexts):
        blocks = [shuffled.pop() for _ in range(num_blocks[index])]
        tables[index, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        k.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        v.append(torch.randn(context, heads.kv, heads.dim, generator=rng).to(dtype))
        for token in range(context):
            block = blocks[token // block_tokens]
            k_cache[block, :, token % block_tokens] = k[-1][token]
            v_cache[block, :, token % block_tokens] = v[-1][token]
    starts = [sum(queries[:index]) for index in range(len(queries) + 1)]
    qkv = torch.full((starts[-1], heads.query + 2 * heads.kv, heads.dim), torch.nan, dtype=dtype)
    qkv[:, : heads.query] = torch.randn(starts[-1], heads.query, heads.dim, generator=rng) * 2
    where = AttentionInput(
        num_decode=len(decodes),
        query_starts=starts,
        context_lens=contexts,
        context_table=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        query_start_table=None,
        query_tiles=None,
    )
    return Paged(qkv.flatten(1), k_cache, v_cache, where, k, v)
