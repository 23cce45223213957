"""A stand-in for CUDA graphs that holds a captured region to what a real capture demands of it.

While it records, nothing may be allocated, resized, read back or copied from the host, as seen by
torch's function and dispatch modes; kernels are not launched but noted down. A replay runs what
was recorded, on the recorded addresses and with the recorded scalars, and none of the Python that
led there, so that whatever depended on the host at capture shows as a wrong result. The record
keeps no memory alive: a buffer that is gone by the time of a replay fails it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from loraplex.engine.graphs import Captured
from loraplex_kernels.gpu.launch import Grid, Launch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

READ_BACK = frozenset(
    ["tolist", "numpy", "cpu", "item", "_local_scalar_dense", "is_nonzero", "equal"]
    + [f"__{name}__" for name in ("bool", "int", "float", "index", "array", "format", "repr")]
)
"""Functions and ops that wait for the device."""


class Refused(Exception):
    """A real capture would have broken off here, or recorded something that goes wrong later."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies; holds nothing alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Place":
        return cls(
            StorageWeakRef(tensor.untyped_storage()),  # type: ignore[no-untyped-call]
            tensor.dtype,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.data_ptr(),
        )

    def tensor(self) -> Tensor:
        if self.storage.expired():  # type: ignore[no-untyped-call]
            raise Refused(f"memory of {self.shape} {self.dtype} was freed after the capture")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        found = torch.empty(0, dtype=self.dtype).set_(
            storage, self.offset, self.shape, self.strides
        )
        assert found.data_ptr() == self.address
        return found


@dataclass(frozen=True)
class Call:
    """One launch or one op of torch, with places instead of tensors."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor | None = None  # of an op that may allocate: the pool's memory, held by the graph

    @classmethod
    def of(
        cls,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor | None = None,
    ) -> "Call":
        leaves, form = tree_flatten((args, kwargs))
        places = [_Place.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(places, form)
        return cls(name, function, args, kwargs, result)

    def run(self) -> None:
        leaves, form = tree_flatten((self.args, self.kwargs))
        found = [leaf.tensor() if isinstance(leaf, _Place) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(found, form)
        value = self.function(*args, **kwargs)
        if self.result is not None:
            self.result.copy_(value)


@dataclass
class RecordedGraph:
    calls: list[Call] = field(default_factory=list)
    num_replays: int = 0

    def replay(self) -> None:
        self.num_replays += 1
        for call in self.calls:
            call.run()

    @property
    def names(self) -> list[str]:
        return [call.name for call in self.calls]


class _State(Enum):
    EAGER = "eager"
    WARM_UP = "warm-up"  # Python runs, so that buffers are made; kernels do not
    RECORDING = "recording"


class Recorder:
    """`graphs.Capturer`, and the `launch` to give to the ops. `may_allocate`: ops by name.

    Mutable: the state, the graphs, and the storages known to be the device's in this capture.
    """

    def __init__(self, launch: Launch, may_allocate: frozenset[str] = frozenset()) -> None:
        self.num_bytes = 0
        self.graphs: list[RecordedGraph] = []
        self._launch = launch
        self._may_allocate = may_allocate
        self._state = _State.EAGER
        self._on_device: set[int] = set()  # storages

    def capture(self, region: Callable[[], Tensor]) -> Captured:
        with self._in(_State.WARM_UP):
            region()
        graph = RecordedGraph()
        self.graphs.append(graph)
        self._on_device.clear()
        watch = _Watch(graph, self._may_allocate, self._on_device)
        with self._in(_State.RECORDING), _NoReadBack(), watch:
            logits = region()
        return Captured(graph, logits)

    def launch(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
        if self._state is _State.EAGER:
            self._launch(kernel, grid, *args, **meta)
        elif self._state is _State.RECORDING:
            if not all(type(size) is int for size in grid):
                raise Refused("a grid of other things than numbers")
            call = Call.of(kernel.__name__, self._launch, (kernel, grid, *args), meta)
            self.graphs[-1].calls.append(call)
            self._on_device |= _storages(_tensors((args, meta)))

    @contextmanager
    def _in(self, state: _State) -> Iterator[None]:
        assert self._state is _State.EAGER, "captures do not nest"
        self._state = state
        try:
            yield
        finally:
            self._state = _State.EAGER


class _NoReadBack(TorchFunctionMode):
    """Sees what a CPU tensor does without any op, like `tolist`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READ_BACK:
            raise Refused(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):
    """Notes every op that writes; views are only Python."""

    def __init__(
        self, graph: RecordedGraph, may_allocate: frozenset[str], on_device: set[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph
        self._may_allocate = may_allocate
        self._on_device = on_device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        given = _tensors((args, kwargs))
        self._refuse(name, func, args, given)
        before = [_Place.of(tensor) for tensor in given]
        result = func(*args, **kwargs)
        if [_Place.of(tensor) for tensor in given] != before:
            raise Refused(f"{name} resized what it writes into")
        made = _storages(_tensors(result)) - _storages(given)
        if made and name not in self._may_allocate:
            raise Refused(f"{name} allocates")
        if made:
            self._graph.calls.append(Call.of(name, func, args, kwargs, result))
        elif func._schema.is_mutable:
            self._graph.calls.append(Call.of(name, func, args, kwargs))
        if made or func._schema.is_mutable:
            self._on_device |= _storages(_tensors(result))
        return result

    def _refuse(self, name: str, func: Any, args: tuple[Any, ...], given: list[Tensor]) -> None:
        if name.split(".")[-1] in READ_BACK or torch.Tag.data_dependent_output in func.tags:
            raise Refused(f"{name} waits for the device")
        if torch.Tag.dynamic_output_shape in func.tags:
            raise Refused(f"{name} waits for the device, for its result's shape")
        if name == "aten.index_put_" and any(t.dtype == torch.bool for t in _tensors(args[1])):
            raise Refused(f"{name} waits for the device, for the number of places")
        # Whatever a kernel was given is the device's; the rest may be the host's.
        if name == "aten.copy_" and not _storages([args[1]]) <= self._on_device:
            raise Refused(f"{name} from memory that is not known to be the device's")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
