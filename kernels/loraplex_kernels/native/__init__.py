"""The CPU ops in C++, compiled for this very processor at first use and kept in a cache."""

from loraplex_kernels.native.build import BuildError, is_built, load_library
from loraplex_kernels.native.ops import NativeOps

__all__ = ["BuildError", "NativeOps", "is_built", "load_library"]
