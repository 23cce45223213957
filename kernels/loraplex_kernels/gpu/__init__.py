"""The ops as Triton kernels: a file an op, launched on a GPU or, for tests, in the interpreter.

Importing anything here imports triton; `TRITON_INTERPRET=1` must be set before.
"""
