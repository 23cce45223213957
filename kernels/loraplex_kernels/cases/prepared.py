"""What a case is: an op, its tensors, and what must come out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.cases.memory import Memory
from loraplex_kernels.granules import GranuleForm
from loraplex_kernels.ops import Ops


class Prepared(ABC):
    """One case's tensors in device memory; they are given back with it."""

    memory: Memory

    @abstractmethod
    def poison(self) -> None:
        """NaN into every output, and what an op changes in place as it was at first."""

    @abstractmethod
    def call(self, ops: Ops) -> None:
        """The op, and nothing else: what is timed."""

    @abstractmethod
    def result(self) -> Tensor:
        """Everything the op wrote, fp32."""

    @abstractmethod
    def expected(self) -> Tensor:
        """The same by the plainest fp32 maths; poison first."""

    def is_intact(self) -> bool:
        """Whether nothing was written outside the outputs."""
        return self.memory.is_intact()

    def run(self, ops: Ops) -> Tensor:
        self.call(ops)
        return self.result()


@dataclass(frozen=True, slots=True)
class Case:
    """One call of an op. `kernel` is one of `gpu.ops.KERNELS`."""

    kernel: str
    name: str
    num_rows: int
    bytes_moved: int  # each byte that the op must touch, once
    make: Callable[[GranuleForm], Prepared]

    def prepare(self, form: GranuleForm = GranuleForm.ROWS) -> Prepared:
        """Its tensors, each time anew; adapters in the form that the ops ask for."""
        return self.make(form)


def joined(*tensors: Tensor) -> Tensor:
    """Several results as one, fp32 [n]."""
    return torch.cat([tensor.float().flatten() for tensor in tensors])
