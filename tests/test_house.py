"""The house stands as it was drawn: import roots, imports that run one way, short files."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT_ROOTS = ("server", "kernels", "clients", "protos")
OURS = ("loraplex", "loraplex_kernels", "loraplex_client", "loraplex_protos")
MAX_LINES = 500

ANYTHING = frozenset(OURS)
LEAVES = {"loraplex.errors", "loraplex.config", "loraplex.engine.sequence"}
BARE_PACKAGES = ("loraplex", "loraplex.adapters", "loraplex.engine")  # no code of their own
# What a module may import of ours: itself and its own parts, and these with their parts. Of several
# entries that fit a module's name the longest counts.
ALLOWED: dict[str, frozenset[str] | set[str]] = {
    "loraplex.errors": set(),
    "loraplex.config": set(),
    "loraplex.logs": set(),
    "loraplex.progress": set(),
    "loraplex.priority": set(),
    "loraplex.metrics": LEAVES,
    "loraplex.observer": {
        *LEAVES,
        "loraplex.adapters.tiers",
        "loraplex.engine.engine",
        "loraplex.metrics",
    },
    # Wiring: the only modules that know everybody.
    "loraplex.cli": ANYTHING,
    "loraplex.demo": {*LEAVES, "loraplex_client"},
    "loraplex.serve": ANYTHING,
    "loraplex.startup": ANYTHING,
    "loraplex.device": LEAVES,
    "loraplex.shapes": {
        *LEAVES,
        "loraplex.engine.model_runner",
        "loraplex.model",
        "loraplex_kernels",
    },
    "loraplex.check": {
        *LEAVES,
        "loraplex.check_report",
        "loraplex.check_stack",
        "loraplex.device",
        "loraplex.shapes",
        "loraplex.model",
        "loraplex.progress",
        "loraplex_kernels",
    },
    "loraplex.check_report": {"loraplex_client", "loraplex_kernels"},
    "loraplex.check_stack": {
        *LEAVES,
        "loraplex.engine.batch",
        "loraplex.engine.step",
        "loraplex.model",
        "loraplex_kernels",
    },
    "loraplex.api": {
        *LEAVES,
        "loraplex.metrics",
        "loraplex.adapters.peft",
        "loraplex.adapters.store",
        "loraplex.adapters.tiers",
        "loraplex.model.stop",
        "loraplex.priority",
        "loraplex_protos",
    },
    "loraplex.engine.sequence": set(),
    "loraplex.engine.arena": set(),
    "loraplex.engine.stream": LEAVES,
    "loraplex.engine.waiting": LEAVES,
    "loraplex.engine.fair_share": LEAVES,
    "loraplex.engine.displacement": {*LEAVES, "loraplex.engine.fair_share"},
    "loraplex.engine.fitting": {*LEAVES, "loraplex.adapters.pool"},
    "loraplex.engine.step": {*LEAVES, "loraplex.adapters.pool"},
    "loraplex.engine.pace": {*LEAVES, "loraplex.engine.step"},
    "loraplex.engine.prefill": {"loraplex.engine.pace"},
    "loraplex.engine.roster": {
        *LEAVES,
        "loraplex.engine.displacement",
        "loraplex.engine.fair_share",
        "loraplex.engine.fitting",
        "loraplex.engine.kv_memory",
        "loraplex.engine.step",
        "loraplex.engine.waiting",
        "loraplex.adapters.pool",
    },
    "loraplex.engine.admission": {
        *LEAVES,
        "loraplex.engine.fitting",
        "loraplex.engine.roster",
        "loraplex.engine.waiting",
        "loraplex.adapters.pool",
    },
    "loraplex.engine.intake": {*LEAVES, "loraplex.engine.fair_share"},
    "loraplex.engine.prefix_cache": {*LEAVES, "loraplex.engine.arena"},
    "loraplex.engine.kv_memory": {
        *LEAVES,
        "loraplex.engine.arena",
        "loraplex.engine.prefix_cache",
        "loraplex.adapters.pool",
    },
    "loraplex.engine.scheduler": {
        *LEAVES,
        "loraplex.engine.admission",
        "loraplex.engine.arena",
        "loraplex.engine.displacement",
        "loraplex.engine.fitting",
        "loraplex.engine.kv_memory",
        "loraplex.engine.pace",
        "loraplex.engine.prefill",
        "loraplex.engine.roster",
        "loraplex.engine.speculation",
        "loraplex.engine.step",
        "loraplex.engine.waiting",
        "loraplex.adapters.pool",
    },
    "loraplex.engine.supply": {
        *LEAVES,
        "loraplex.engine.fitting",
        "loraplex.engine.scheduler",
        "loraplex.engine.step",
        "loraplex.adapters.pool",
        "loraplex.adapters.tiers",
    },
    "loraplex.engine.engine": {
        *LEAVES,
        "loraplex.engine.arena",
        "loraplex.engine.fair_share",
        "loraplex.engine.intake",
        "loraplex.engine.scheduler",
        "loraplex.engine.step",
        "loraplex.engine.stream",
        "loraplex.engine.supply",
        "loraplex.adapters.pool",
        "loraplex.adapters.tiers",
    },
    "loraplex.engine.speculation": {
        *LEAVES,
        "loraplex.engine.kv_memory",
        "loraplex.engine.step",
    },
    "loraplex.engine.draw": LEAVES,
    "loraplex.engine.sampler": {
        *LEAVES,
        "loraplex.engine.draw",
        "loraplex.engine.step",
    },
    "loraplex.engine.batch": {
        *LEAVES,
        "loraplex.adapters.packing",
        "loraplex.engine.step",
        "loraplex.model",
        "loraplex_kernels",
    },
    "loraplex.engine.transfer": set(),
    "loraplex.engine.graphs": {
        *LEAVES,
        "loraplex.engine.batch",
        "loraplex.engine.step",
        "loraplex.engine.transfer",
        "loraplex.model",
        "loraplex_kernels",
    },
    "loraplex.engine.model_runner": {
        *LEAVES,
        "loraplex.engine.batch",
        "loraplex.engine.sampler",
        "loraplex.engine.graphs",
        "loraplex.engine.step",
        "loraplex.engine.transfer",
        "loraplex.adapters.packing",
        "loraplex.model",
        "loraplex_kernels",
    },
    "loraplex.adapters.pool": {"loraplex.engine.arena", "loraplex.engine.prefix_cache"},
    "loraplex.adapters.tiers": set(),
    "loraplex.adapters.safetensors_header": LEAVES,
    "loraplex.adapters.peft": {*LEAVES, "loraplex.adapters.safetensors_header"},
    "loraplex.adapters.store": {
        *LEAVES,
        "loraplex.adapters.peft",
        "loraplex.adapters.safetensors_header",
        "loraplex.priority",
    },
    "loraplex.adapters.dora": set(),
    "loraplex.adapters.packing": {
        *LEAVES,
        "loraplex.adapters.dora",
        "loraplex.adapters.peft",
        "loraplex.adapters.safetensors_header",
        "loraplex.model.config",
        "loraplex_kernels",
    },
    "loraplex.adapters.loader": {
        *LEAVES,
        "loraplex.adapters.packing",
        "loraplex.adapters.peft",
        "loraplex.adapters.safetensors_header",
        "loraplex.adapters.store",
        "loraplex.priority",
        "loraplex_kernels",
    },
    "loraplex.adapters.publisher": {
        *LEAVES,
        "loraplex.adapters.loader",
        "loraplex.adapters.peft",
        "loraplex.adapters.store",
    },
    "loraplex.model": {*LEAVES, "loraplex_kernels"},
    "loraplex_kernels": set(),
    "loraplex_client": {"loraplex_protos"},
    "loraplex_protos": set(),
}

TORCH_FREE = (
    "loraplex_client",
    "loraplex_client.cli",
    "loraplex.cli",
    "loraplex.observer",
    "loraplex.adapters.peft",
    "loraplex.adapters.pool",
    "loraplex.adapters.store",
    "loraplex.engine.arena",
    "loraplex.engine.prefix_cache",
    "loraplex.engine.scheduler",
    "loraplex.engine.engine",
    "loraplex.api.server",
)


def sources() -> Iterator[tuple[str, Path]]:
    """Our modules by name; a package goes by its folder's."""
    for root in IMPORT_ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            parts = path.relative_to(ROOT / root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(sources())


def imports(path: Path) -> Iterator[str]:
    """Every module of ours that a file names in an import, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in OURS)


def is_part_of(module: str, whole: str) -> bool:
    """Parts are what lies in a package, or is named after a module: store_files is store's."""
    beside = whole.count(".") > 1 and module.startswith(f"{whole}_")
    return module == whole or module.startswith(f"{whole}.") or beside


def allowed_to(module: str) -> set[str]:
    entries = [entry for entry in ALLOWED if is_part_of(module, entry)]
    assert entries, f"{module} is new: say in ALLOWED what it may import"
    entry = max(entries, key=len)
    return {entry, *ALLOWED[entry]}


def test_the_import_roots_are_no_packages() -> None:
    """A package called `kernels` would shadow the one that transformers and bitsandbytes import."""
    assert [root for root in IMPORT_ROOTS if (ROOT / root / "__init__.py").exists()] == []


@pytest.mark.parametrize("package", BARE_PACKAGES)
def test_bare_packages_are_empty(package: str) -> None:
    assert MODULES[package].read_text() == ""


@pytest.mark.parametrize("module", sorted(MODULES.keys() - set(BARE_PACKAGES)))
def test_imports_run_one_way(module: str) -> None:
    allowed = allowed_to(module)
    refused = [
        imported
        for imported in imports(MODULES[module])
        if not any(is_part_of(imported, whole) for whole in allowed)
    ]
    assert refused == [], f"{module} may not import these; DESIGN says which way imports run"


def test_every_entry_of_the_table_is_a_module() -> None:
    assert set(ALLOWED) <= set(MODULES)


def test_modules_that_leave_torch_out() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'{name} imports torch')\n"
    )
    command = [sys.executable, "-c", code, *TORCH_FREE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_files_stay_short() -> None:
    folders = (*IMPORT_ROOTS, "tests", "benchmarks")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in paths
        if not path.match("*_pb2*.py")
    }
    assert len(lengths) > 50
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
