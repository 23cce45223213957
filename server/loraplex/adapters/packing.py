"""An adapter's weights as the arena holds them: pieces laid into equal blocks.

Per layer and module, A and B of each 16 ranks, in the form that the ops ask for, the last ones
padded with zeros; a DoRA module's output scale fp32 [out]; embed_tokens' and lm_head's matrices cut
into pieces of whole rows. Each piece starts on 64 bytes and none crosses a block's edge. Packed
once; loading is a copy a block. The packed file is a cache: the uploaded safetensors and config
stay the truth.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loraplex_kernels.granules import GRANULE_RANK, GranuleForm
from loraplex_kernels.tables import Granule, OutputScale
from loraplex_kernels.vocabulary import CutMatrix, Vocabulary, VocabularyLora
from safetensors import safe_open
from torch import Tensor

from loraplex.adapters.dora import output_scale
from loraplex.adapters.peft import AdapterModule, AdapterSpec, AdapterTensor, BaseCopy
from loraplex.adapters.safetensors_header import shown
from loraplex.errors import AdapterInvalidError
from loraplex.model.config import EMBEDDING, MODULES

FORMAT = 3
ALIGNMENT = 64  # bytes; a cache line, and what 128-bit loads need
COMPARED_ROWS = 4096  # of a base tensor that came along, at a time

_NOTHING = Vocabulary()

BaseWeights = Callable[[str], Tensor]
"""A base weight by its module's name, "model.layers.0.self_attn.q_proj", in the shape a checkpoint
gives it: the bf16 values that are served, in any floating type and on any device."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the packed bytes depend on beside the adapter itself."""

    block_bytes: int
    dtype: torch.dtype
    form: GranuleForm = GranuleForm.ROWS

    @property
    def fingerprint(self) -> str:
        text = (
            f"{FORMAT} {GRANULE_RANK} {ALIGNMENT} {self.block_bytes} {self.dtype} {self.form.value}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a slot's weights lie in the arena: what the tables are told of it.

    A slot is bound with `DeviceMemory.bind(slot, placed)` (engine/batch.py).
    """

    granules: tuple[Granule, ...]
    output_scales: tuple[OutputScale, ...] = ()  # DoRA's
    vocabulary: Vocabulary = _NOTHING


def blended(members: Iterable[tuple[Placed, float]]) -> Placed:
    """The weighted sum of the members' updates, as PEFT's "cat": their granules, side by side.

    No member has output scales.
    """
    granules: list[Granule] = []
    embedding: list[VocabularyLora] = []
    head: list[VocabularyLora] = []
    parts: Counter[tuple[int, int]] = Counter()
    for placed, weight in members:
        assert not placed.output_scales, "a DoRA adapter in a blend"
        for granule in placed.granules:
            where = granule.layer, granule.module
            granules.append(granule._replace(part=parts[where], scale=weight * granule.scale))
            parts[where] += 1
        embedding += _weighted(placed.vocabulary.embedding, weight)
        head += _weighted(placed.vocabulary.head, weight)
    return Placed(tuple(granules), vocabulary=Vocabulary(tuple(embedding), tuple(head)))


def _weighted(updates: Iterable[VocabularyLora], weight: float) -> list[VocabularyLora]:
    return [update._replace(scale=weight * update.scale) for update in updates]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """`data` uint8 [num_blocks, block_bytes]; offsets in `contents` count from its start."""

    data: Tensor
    contents: Placed

    @property
    def num_blocks(self) -> int:
        return int(self.data.shape[0])

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def num_parts(self) -> int:
        """Granules of the module with the largest rank."""
        vocabulary = (*self.contents.vocabulary.embedding, *self.contents.vocabulary.head)
        parts = [1 + granule.part for granule in self.contents.granules]
        return max([*parts, *(num_granules(update.narrow.rows) for update in vocabulary)])

    def placed(self, blocks: Sequence[int]) -> Placed:
        """With offsets in the arena, where block i of `data` is blocks[i]."""
        size = int(self.data.shape[1])

        def there(offset: int) -> int:
            return blocks[offset // size] * size + offset % size

        def cut(matrix: CutMatrix) -> CutMatrix:
            return matrix._replace(offsets=tuple(map(there, matrix.offsets)))

        def moved(updates: Iterable[VocabularyLora]) -> tuple[VocabularyLora, ...]:
            return tuple(u._replace(wide=cut(u.wide), narrow=cut(u.narrow)) for u in updates)

        here = self.contents
        return Placed(
            tuple(g._replace(a=there(g.a), b=there(g.b)) for g in here.granules),
            tuple(scale._replace(offset=there(scale.offset)) for scale in here.output_scales),
            Vocabulary(moved(here.vocabulary.embedding), moved(here.vocabulary.head)),
        )


def num_granules(rank: int) -> int:
    return -(-rank // GRANULE_RANK)


def pack(
    weights: Path, spec: AdapterSpec, layout: Layout, base_weights: BaseWeights
) -> PackedAdapter:
    """Lay out a validated safetensors file; at most one module is unpacked at a time.

    AdapterInvalidError when a value does not fit the layout's type, or a base tensor that came
    along is not the served base's own.
    """
    sizes = {piece: size for module in spec.modules for piece, size in _pieces(module, layout)}
    offsets, num_blocks = place(list(sizes.values()), layout.block_bytes)
    data = torch.zeros(num_blocks, layout.block_bytes, dtype=torch.uint8)
    with safe_open(weights, framework="pt") as file:
        for copy in spec.base_copies:
            _check_copy(file, copy, base_weights)
        packer = _Packer(file, data, dict(zip(sizes, offsets, strict=True)), layout, base_weights)
        for module in spec.modules:
            packer.add(module)
    return PackedAdapter(data, packer.contents())


def place(sizes: Sequence[int], block_bytes: int) -> tuple[list[int], int]:
    """Offsets for pieces of these sizes, none across a block's edge, and the number of blocks.

    First fit, largest first: what is left of a block is less than the smallest piece that follows.
    """
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    assert max(rounded) <= block_bytes, "a piece is larger than a block"
    offsets = [0] * len(sizes)
    used: list[int] = []
    first_open = 0
    smallest = min(rounded)
    for index in sorted(range(len(sizes)), key=lambda i: -rounded[i]):
        block = first_open
        while block < len(used) and used[block] + rounded[index] > block_bytes:
            block += 1
        if block == len(used):
            used.append(0)
        offsets[index] = block * block_bytes + used[block]
        used[block] += rounded[index]
        while first_open < len(used) and used[first_open] + smallest > block_bytes:
            first_open += 1
    return offsets, len(used)


class _Piece(NamedTuple):
    """What lies in one stretch of the packed bytes."""

    name: str  # the module's, in the base model
    part: str  # "a", "b", "scale", "wide", "narrow"
    number: int = 0  # which 16 ranks, or which rows


def _pieces(module: AdapterModule, layout: Layout) -> list[tuple[_Piece, int]]:
    """The pieces of one module, and their sizes in bytes."""
    base, size = module.base, layout.dtype.itemsize
    if base.layer is None:
        wide, narrow = _cuts(module, layout)
        return [
            *_rows_of(base.name, "wide", wide, size),
            *_rows_of(base.name, "narrow", narrow, size),
        ]
    features = (("a", base.in_features), ("b", base.out_features))
    pieces = [
        (_Piece(base.name, part, index), layout.form.num_bytes(width, layout.dtype))
        for index in range(num_granules(module.rank))
        for part, width in features
    ]
    if module.magnitude is not None:
        pieces.append((_Piece(base.name, "scale"), base.out_features * torch.float32.itemsize))
    return pieces


def _cuts(module: AdapterModule, layout: Layout) -> tuple[CutMatrix, CutMatrix]:
    """The wide and the narrow matrix of an update along the vocabulary, cut but not yet placed."""
    features = (module.base.in_features, module.base.out_features)
    vocab, hidden = features if module.base.name == EMBEDDING else reversed(features)
    return _cut(vocab, module.rank, layout), _cut(module.rank, hidden, layout)


def _cut(rows: int, columns: int, layout: Layout) -> CutMatrix:
    row_bytes = columns * layout.dtype.itemsize
    return CutMatrix(rows, columns, min(rows, layout.block_bytes // row_bytes), ())


def _rows_of(name: str, part: str, matrix: CutMatrix, itemsize: int) -> list[tuple[_Piece, int]]:
    firsts = range(0, matrix.rows, matrix.piece_rows)
    return [
        (
            _Piece(name, part, index),
            min(matrix.piece_rows, matrix.rows - first) * matrix.columns * itemsize,
        )
        for index, first in enumerate(firsts)
    ]


class _Packer:
    """Writes one adapter's modules at the places that were found for their pieces.

    Mutable: `data`, and the lists of what was written, which `contents` sums up.
    """

    def __init__(
        self,
        file: Any,
        data: Tensor,
        offsets: dict[_Piece, int],
        layout: Layout,
        base_weights: BaseWeights,
    ) -> None:
        self._file = file
        self._data = data.view(-1)
        self._offsets = offsets
        self._layout = layout
        self._base_weights = base_weights
        self._granules: list[Granule] = []
        self._output_scales: list[OutputScale] = []
        self._embedding: list[VocabularyLora] = []
        self._head: list[VocabularyLora] = []

    def contents(self) -> Placed:
        vocabulary = Vocabulary(tuple(self._embedding), tuple(self._head))
        return Placed(tuple(self._granules), tuple(self._output_scales), vocabulary)

    def add(self, module: AdapterModule) -> None:
        layer = module.base.layer
        if layer is None:
            self._add_vocabulary(module)
            return
        name, index = module.base.name, MODULES.index(module.base.module)
        raw_a, raw_b = self._read(module.a), self._read(module.b)
        a, b = self._rounded(raw_a, module.a), self._rounded(raw_b, module.b).T
        for part in range(num_granules(module.rank)):
            ranks = slice(part * GRANULE_RANK, (part + 1) * GRANULE_RANK)
            at_a = self._offsets[_Piece(name, "a", part)]
            at_b = self._offsets[_Piece(name, "b", part)]
            self._layout.form.write_a(self._data, at_a, a[ranks])
            self._layout.form.write_b(self._data, at_b, b[ranks])
            self._granules.append(Granule(layer, index, part, at_a, at_b, module.scale))
        if module.magnitude is not None:
            scale = output_scale(
                self._base_weights(name), raw_a, raw_b, module.scale, self._read(module.magnitude)
            )
            _check_finite(scale, module.magnitude, "makes an output scale that is not finite")
            place = self._write(_Piece(name, "scale"), scale)
            self._output_scales.append(OutputScale(layer, index, place))

    def _add_vocabulary(self, module: AdapterModule) -> None:
        a = self._rounded(self._read(module.a), module.a)
        b = self._rounded(self._read(module.b), module.b)
        is_embedding = module.base.name == EMBEDDING
        wide, narrow = (a.T, b.T) if is_embedding else (b, a)
        wide_cut, narrow_cut = _cuts(module, self._layout)
        update = VocabularyLora(
            self._write_rows(module, "wide", wide_cut, wide),
            self._write_rows(module, "narrow", narrow_cut, narrow),
            module.scale,
        )
        (self._embedding if is_embedding else self._head).append(update)

    def _write_rows(
        self, module: AdapterModule, part: str, cut: CutMatrix, matrix: Tensor
    ) -> CutMatrix:
        offsets = [
            self._write(_Piece(module.base.name, part, index), rows)
            for index, rows in enumerate(torch.split(matrix, cut.piece_rows))
        ]
        return cut._replace(offsets=tuple(offsets))

    def _read(self, matrix: AdapterTensor) -> Tensor:
        tensor: Tensor = self._file.get_tensor(matrix.tensor)
        return tensor

    def _rounded(self, tensor: Tensor, matrix: AdapterTensor) -> Tensor:
        dtype = self._layout.dtype
        rounded = tensor.to(dtype)
        if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
            short = str(dtype).removeprefix("torch.")
            _check_finite(rounded, matrix, f"holds values that {short} cannot hold")
        return rounded

    def _write(self, piece: _Piece, values: Tensor) -> int:
        """Copy the values to the piece's place, and say where that is."""
        offset = self._offsets[piece]
        there = self._data[offset : offset + values.numel() * values.itemsize]
        there.view(values.dtype).view(values.shape).copy_(values)
        return offset


def _check_finite(values: Tensor, matrix: AdapterTensor, message: str) -> None:
    """In numpy, which takes no second thread from the engine."""
    bits_type, exponent = _EXPONENTS[values.dtype]
    bits = values.contiguous().view(bits_type).numpy()
    if ((bits & exponent) == exponent).any():
        raise AdapterInvalidError(shown(matrix.tensor), message)


_EXPONENTS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F80_0000),
}


def _check_copy(file: Any, copy: BaseCopy, base_weights: BaseWeights) -> None:
    """A base tensor that the trainer saved along must be the served one, in the base's bf16."""
    theirs, ours = file.get_slice(copy.tensor), base_weights(copy.name)
    for first in range(0, len(ours), COMPARED_ROWS):
        rows = slice(first, first + COMPARED_ROWS)
        same = torch.equal(theirs[rows].to(torch.bfloat16), ours[rows].to("cpu", torch.bfloat16))
        if not same:
            raise AdapterInvalidError(
                shown(copy.tensor),
                f"is not this base model's own {copy.name}: replacing whole modules of the base"
                " model is not served",
            )


def save_packed(packed: PackedAdapter, path: Path) -> None:
    """Write the cache file; not atomic, so give it a temporary place first.

    A safetensors file, written here because the library holds the interpreter while it copies.
    """
    contents = packed.contents
    tensors = {
        "data": packed.data,
        "granules": _table([g[:5] for g in contents.granules], 5),
        "scale": torch.tensor([g.scale for g in contents.granules], dtype=torch.float64),
        "output_scales": _table(contents.output_scales, 3),
    }
    header: dict[str, Any] = {"__metadata__": {"vocabulary": json.dumps(contents.vocabulary)}}
    start = 0
    for name, tensor in tensors.items():
        span = [start, start + tensor.nbytes]
        dtype = _NAMES_OF_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": span}
        start = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().data)


_NAMES_OF_DTYPES = {torch.uint8: "U8", torch.int64: "I64", torch.float64: "F64"}


def _table(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, columns)


def open_packed(path: Path) -> PackedAdapter:
    """The cache file, its weights mapped rather than read."""
    with safe_open(path, framework="pt") as file:
        index, scales = file.get_tensor("granules").tolist(), file.get_tensor("scale").tolist()
        granules = tuple(
            Granule(layer, module, part, a, b, scale)
            for (layer, module, part, a, b), scale in zip(index, scales, strict=True)
        )
        output_scales = tuple(
            OutputScale(*row) for row in file.get_tensor("output_scales").tolist()
        )
        vocabulary = Vocabulary(*map(_updates, json.loads(file.metadata()["vocabulary"])))
        return PackedAdapter(file.get_tensor("data"), Placed(granules, output_scales, vocabulary))


def _updates(rows: Iterable[tuple[Any, Any, float]]) -> tuple[VocabularyLora, ...]:
    """From JSON, which knows lists alone."""

    def cut(matrix: Sequence[Any]) -> CutMatrix:
        rows, columns, piece_rows, offsets = matrix
        return CutMatrix(rows, columns, piece_rows, tuple(offsets))

    return tuple(VocabularyLora(cut(wide), cut(narrow), scale) for wide, narrow, scale in rows)
