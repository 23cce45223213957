"""What README.md says is so."""

import ast
import re
from pathlib import Path

import loraplex_client
import pytest
from loraplex.api.status import errors_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_errors_are_the_servers_own() -> None:
    assert errors_table().strip() in README


def test_every_module_stands_in_the_architecture() -> None:
    tree = README.split("## Architecture", 1)[1]
    sources = [
        path
        for folder in ("server/loraplex", "kernels/loraplex_kernels", "clients/loraplex_client")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py" and not path.name.startswith("cli_")
    ]
    missing = [path.name for path in sources if not re.search(rf"\b{path.name}\b", tree)]
    assert missing == []


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_uses_names_that_exist(code: str) -> None:
    tree = ast.parse(code)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        assert node.module == "loraplex_client"
        assert all(hasattr(loraplex_client, alias.name) for alias in node.names)
    methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"upload_adapter", "complete", "stream"} <= methods
    assert all(hasattr(loraplex_client.Client, m) for m in ("upload_adapter", "complete", "stream"))


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
