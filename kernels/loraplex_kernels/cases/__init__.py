"""The ops over a model's shapes: one list for the self-check, the compile report, the benchmark.

Every tensor lies between margins of NaN, and outputs are NaN before each run, so that a read or a
write outside shows.
"""

from loraplex_kernels.cases.prepared import Case, Prepared
from loraplex_kernels.cases.shapes import SERVING, TINY, LinearShape, ModelShapes, Scale
from loraplex_kernels.cases.table import CaseMaker, cases

__all__ = [
    "SERVING",
    "TINY",
    "Case",
    "CaseMaker",
    "LinearShape",
    "ModelShapes",
    "Prepared",
    "Scale",
    "cases",
]
