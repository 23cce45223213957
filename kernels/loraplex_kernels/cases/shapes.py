"""A decoder's shapes, and how large the batches are that its ops are tried on."""

from dataclasses import dataclass
from typing import NamedTuple

from loraplex_kernels.ops import Projection

NUM_MODULES = 7
"""Linears of a decoder layer: q, k, v, o, gate, up, down."""


class LinearShape(NamedTuple):
    """One stacked linear of a layer."""

    name: str
    in_features: int
    projections: tuple[Projection, ...]

    @property
    def out_features(self) -> int:
        return sum(projection.width for projection in self.projections)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """What the ops of one decoder depend on."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    block_tokens: int = 16  # of the arena that keys and values lie in

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The four stacked linears, their projections numbered as the adapter tables do."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inter = self.hidden_size, self.intermediate_size
        return (
            _stack("qkv", hidden, 0, (q, kv, kv)),
            _stack("o", q, 3, (hidden,)),
            _stack("gate_up", hidden, 4, (inter, inter)),
            _stack("down", inter, 6, (hidden,)),
        )


def _stack(name: str, in_features: int, module: int, widths: tuple[int, ...]) -> LinearShape:
    projections = tuple(
        Projection(module + index, sum(widths[:index]), width) for index, width in enumerate(widths)
    )
    return LinearShape(name, in_features, projections)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the cases are."""

    decode_rows: tuple[int, ...]  # batches of one token a sequence
    prefill_rows: int  # tokens of a prefill step; enough for a long tile
    context: int  # keys, in the attention cases
    linears: tuple[str, ...] = ("qkv", "o", "gate_up", "down")


SERVING = Scale(decode_rows=(1, 8, 32, 64), prefill_rows=512, context=1024)
"""As a server meets them."""

TINY = Scale(decode_rows=(9,), prefill_rows=75, context=40, linears=("qkv", "down"))
"""For the interpreter, where a launch takes a second."""
