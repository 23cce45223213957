"""The LoRA kernels against the plain fp32 form: every popularity, odd shapes, poison all around."""

import pytest
import torch
from loraplex_kernels.gpu.launch import launch_now
from loraplex_kernels.gpu.lora import lora_, shrink, slice_of
from loraplex_kernels.ops import Projection
from loraplex_kernels.segments import LONG_TILE_ROWS, NO_ADAPTER
from torch import Tensor

from tests.kernels.gpu.banks import PoisonedWorkspace, Recorder, framed, with_tiles
from tests.kernels.inputs import POPULARITY, PROJECTIONS, Bank, K, bank_of

TARGET = "interpreter"
UNWRITTEN = -1e30
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = {
    "stacked": (K, PROJECTIONS),
    "many_blocks": (997, (Projection(2, 9, 300), Projection(0, 309, 17), Projection(1, 330, 576))),
    "not_all_modules": (512, (Projection(2, 0, 40), Projection(0, 40, 40))),
    "single": (576, (Projection(1, 1, 1),)),
}


def some(
    shape: str, dtype: torch.dtype, num_rows: int, rng: torch.Generator
) -> tuple[Bank, Tensor, Tensor]:
    """A bank, y with columns to spare at its end, and x."""
    k, projections = SHAPES[shape]
    bank = bank_of(dtype, rng, k, projections)
    num_columns = max(p.column + p.width for p in projections) + 6
    y = torch.randn(num_rows, num_columns, generator=rng).to(dtype)
    return bank, y, torch.randn(num_rows, k, generator=rng).to(dtype)


def run(
    bank: Bank, y: Tensor, x: Tensor, slots: list[int], layer: int = 1, spare: int = 1
) -> Tensor:
    """y afterwards; the kernels get copies of y and x, in frames of NaN."""
    x_frame, y_frame = framed(x), framed(y)
    lora = with_tiles(bank, slots, spare)
    arena = bank.arena.clone()
    lora_(
        launch_now,
        y_frame.inner,
        x_frame.inner,
        lora,
        layer,
        bank.projections,
        PoisonedWorkspace(),
        TARGET,
    )
    assert x_frame.is_intact()
    assert y_frame.is_intact()
    assert torch.equal(x_frame.inner, x)
    assert torch.equal(bank.arena, arena)
    return y_frame.inner.clone()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: object = None) -> None:
    assert actual.dtype == dtype
    error, largest = (actual.float() - expected).abs().max(), expected.abs().max()
    assert error <= TOLERANCE[dtype] * largest, f"error {error:.2e} of {largest:.2e} in {what}"


def is_negative_zero(values: Tensor) -> bool:
    """What y stays where nothing is added, and what adding 0 to it would not leave."""
    return bool((values.signbit() & (values == 0.0)).all())


def untouched(bank: Bank, y: Tensor, slots: list[int], layer: int = 1) -> Tensor:
    """Which entries of y no adapter adds to."""
    mask = torch.ones(y.shape, dtype=torch.bool)
    for row, slot in enumerate(slots):
        for module, column, width in bank.projections:
            mask[row, column : column + width] = (slot, layer, module) not in bank.matrices
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_popularity(dtype: torch.dtype, rng: torch.Generator) -> None:
    """All in one batch, as a launch costs the interpreter more than rows do."""
    slots: list[int] = []
    where: dict[tuple[str, int], slice] = {}
    for name, popularity in POPULARITY.items():
        for num_rows in (1, 7, 20):
            first = len(slots)
            slots += [*popularity(num_rows, rng), NO_ADAPTER]
            where[name, num_rows] = slice(first, len(slots))
    bank, y, x = some("stacked", dtype, len(slots), rng)
    same = untouched(bank, y, slots)
    y[same] = -0.0
    out, expected = run(bank, y, x, slots), bank.reference(y, x, slots, 1)
    for part, rows in where.items():
        assert_close(out[rows], expected[rows], dtype, part)
    assert is_negative_zero(out[same])


@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.bfloat16, id="bf16")])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    """Every rank in short tiles, and long ones from segments at both sides of their length."""
    long = LONG_TILE_ROWS
    slots = [NO_ADAPTER, 0, 1, 2, 3, 4, 5, NO_ADAPTER, *[3] * long, *[1] * (long + 1)]
    bank, y, x = some(shape, dtype, len(slots), rng)
    same = untouched(bank, y, slots)
    y[same] = -0.0
    out = run(bank, y, x, slots)
    assert_close(out, bank.reference(y, x, slots, 1), dtype)
    assert is_negative_zero(out[same])


def test_activations_wider_than_the_weights(rng: torch.Generator) -> None:
    slots = [0, 1, 3, 3]
    bank, y, x = some("stacked", torch.float16, len(slots), rng)
    x, y = x.float() + 1e-4, y.float() + 1e-4
    out = run(bank, y, x, slots)
    error = (out - bank.reference(y, x, slots, 1)).abs().max() / out.abs().max()
    assert out.dtype == torch.float32
    assert float(error) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("spare", [0, 2])
def test_no_row_with_an_adapter(spare: int, rng: torch.Generator) -> None:
    """No tile at all, and lists of nothing but padding."""
    bank, y, x = some("stacked", torch.float16, 40, rng)
    assert torch.equal(run(bank, y, x, [NO_ADAPTER] * 40, spare=spare), y)


def test_shrink_writes_what_its_layout_says_and_nothing_else(rng: torch.Generator) -> None:
    """Granules that an adapter lacks stay as they were, and so do rows without one."""
    slots = [3, NO_ADAPTER, 1, 1, 4, 2]
    bank, _, x = some("many_blocks", torch.float32, len(slots), rng)
    lora, workspace = with_tiles(bank, slots, 1), PoisonedWorkspace(UNWRITTEN)
    parts = shrink(launch_now, x, lora, 1, bank.projections, workspace, TARGET)
    granules = bank.tables.scale.shape[3]
    expected = torch.full((len(slots), len(bank.projections), granules * 16), UNWRITTEN)
    for row, slot in enumerate(slots):
        for number, projection in enumerate(bank.projections):
            if (slot, 1, projection.module) in bank.matrices:
                a = bank.matrices[slot, 1, projection.module][0]
                expected[row, number, : -(-a.shape[0] // 16) * 16] = 0.0
                expected[row, number, : a.shape[0]] = a @ x[row]
    expected = expected.flatten(1)
    is_written = expected != UNWRITTEN
    assert parts.shape == (2, *expected.shape)
    assert (parts[:, ~is_written] == UNWRITTEN).all()
    assert_close(parts.sum(0)[is_written], expected[is_written], torch.float32)


@pytest.mark.parametrize(
    ("k", "block_k", "max_split", "expected"),
    [
        (1, 256, 8, 256),
        (256, 256, 8, 256),
        (257, 256, 8, 256),
        (4096, 256, 8, 512),
        (14336, 256, 8, 1792),
        (3584, 256, 8, 512),  # 14 blocks: 7 slices of 2
        (997, 256, 2, 512),
    ],
)
def test_slices_of_k(k: int, block_k: int, max_split: int, expected: int) -> None:
    assert slice_of(k, block_k, max_split) == expected


def test_a_row_does_not_depend_on_its_neighbours(rng: torch.Generator) -> None:
    """Bit for bit: other rows, where in the tile it lies, padding; so the same twice, too."""
    slots = [1, *[3] * 14, 0, NO_ADAPTER, 4, 1]
    bank, y, x = some("many_blocks", torch.float16, len(slots), rng)
    out = run(bank, y, x, slots)
    assert torch.equal(run(bank, y, x, slots, spare=0), out)
    for row in (0, 1, 14, 18):
        alone = run(bank, y[row : row + 1], x[row : row + 1], slots[row : row + 1])
        assert torch.equal(alone[0], out[row])


def test_one_launch_serves_whatever_the_tensors_say(rng: torch.Generator) -> None:
    """Recorded with no adapter in the batch, and replayed as a captured graph is."""
    num_rows, nobody = 18, [NO_ADAPTER] * 18
    bank, y, x = some("stacked", torch.float32, num_rows, rng)
    out, fixed = y.clone(), with_tiles(bank, nobody, spare=num_rows)
    workspace, recorder = PoisonedWorkspace(), Recorder()
    lora_(recorder, out, x, fixed, 1, bank.projections, workspace, TARGET)
    assert fixed.tiles is not None
    everyone = [0, 1, 2, 3, 4, 5, *[1] * 9, NO_ADAPTER, 3, 0]
    for slots in ([3, *nobody[1:]], everyone, nobody, [4] * num_rows):
        tiles = with_tiles(bank, slots, spare=num_rows).tiles
        assert tiles is not None
        fixed.tiles.short.copy_(tiles.short[:num_rows])
        fresh = Recorder()
        lora_(fresh, out, x, fixed, 1, bank.projections, workspace, TARGET)
        assert fresh.arguments == recorder.arguments
        out.copy_(y)
        recorder.replay()
        assert_close(out, bank.reference(y, x, slots, 1), torch.float32, slots)
    bank.tables.write(4, [])
    out.copy_(y)
    recorder.replay()
    assert torch.equal(out, y)
