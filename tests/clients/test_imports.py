"""The client is light: what a program pays for `import loraplex_client`, and for its CLI."""

import subprocess
import sys

import pytest

_HEAVY = ("torch", "numpy", "safetensors", "transformers", "loraplex")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("loraplex_client", (*_HEAVY, "rich", "argparse")),
        ("loraplex_client.cli", (*_HEAVY, "rich")),
        ("loraplex_client.side_by_side", _HEAVY),
    ],
)
def test_importing_leaves_out(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(set({absent!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
