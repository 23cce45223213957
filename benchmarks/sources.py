"""A hash of the sources that decide what is compiled: it tells whether a report is of these."""

import ast
import hashlib
import io
import tokenize

from environment import ROOT

PACKAGE = ROOT / "kernels" / "loraplex_kernels"
COMPILED = (
    "granules.py",
    "ops.py",
    "segments.py",
    "tables.py",
    "cases/*.py",
    "gpu/*.py",
    "gpu/configs/*.json",
)
NOT_COMPILED = ("interpreter", "measured", "paths", "target", "trusted")
TOOLS = ("compiling", "disassembly", "model_shapes")


def source_hash() -> str:
    """sha256 over kernels, launchers, configurations, cases, and what counts instructions.

    Comments and docstrings change nothing that is compiled, and are left out.
    """
    skipped = {PACKAGE / "gpu" / f"{name}.py" for name in NOT_COMPILED}
    kernels = {path for pattern in COMPILED for path in PACKAGE.glob(pattern)} - skipped
    tools = {ROOT / "benchmarks" / f"{name}.py" for name in TOOLS}
    digest = hashlib.sha256()
    for path in sorted(kernels | tools):
        text = path.read_text(encoding="utf-8")
        code = code_of(text) if path.suffix == ".py" else text
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0{code}\0".encode())
    return digest.hexdigest()


def code_of(text: str) -> str:
    """A module's lines without comments, docstrings and blank ones, whatever Python reads it."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            for row in range(node.lineno, node.end_lineno + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())
