"""What a kernel is refused for, and how the report puts it."""

from dataclasses import replace

import pytest
from gates import TARGETS, Row, gate
from kernel_table import markdown

GOOD = Row(
    kernel="nf4",
    function="nf4_linear",
    config="TOKENS=16",
    arguments="x:*bf16/16",
    target="sm_80",
    case="Llama-3-8B: nf4_linear, qkv, 8 adapters, 32 rows",
    registers=80,
    stack=0,
    spills=0,
    shared=20480,
    warps=4,
    stages=3,
    dots=2,
    tensor_core=8,
    wide=4,
    atomics=0,
    inline_ptx=1,
    sass_a_weight=7.5,
    diagnostics=(),
)
ABOUT = {
    "command": "make kernels-report",
    "sources": "0123456789abcdef",
    "triton": "3.9.0",
    "ptxas": "12.9",
    "ptxas-blackwell": "13.0",
}


def test_a_good_row_passes_on_every_nvidia_target() -> None:
    nvidia = [target for target in TARGETS if target.startswith("sm_")]
    assert len(nvidia) == 5
    assert [gate(replace(GOOD, target=target)) for target in nvidia] == [[]] * 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (replace(GOOD, stack=8), "spills: 8 bytes of stack, 0 accesses"),
        (replace(GOOD, spills=3), "spills: 0 bytes of stack, 3 accesses"),
        (replace(GOOD, shared=166913), "shared memory: 166913 of 166912 bytes"),
        (
            replace(GOOD, target="sm_86", shared=120000),
            "shared memory: 120000 of 101376 bytes",
        ),
        (replace(GOOD, tensor_core=0), "no HMMA although it holds a dot"),
        (replace(GOOD, wide=0), "no 128-bit access to global memory"),
        (replace(GOOD, atomics=1), "1 atomic instructions"),
        (replace(GOOD, target="gfx942"), "1 pieces of inline PTX"),
        (replace(GOOD, sass_a_weight=8.6), "8.6 SASS a weight, 8.5 at most"),
        (replace(GOOD, sass_a_weight=None), "the loop that decodes NF4 was not found"),
        (replace(GOOD, diagnostics=("warning: x",)), "a compiler says: warning: x"),
    ],
)
def test_each_gate_alone(row: Row, reason: str) -> None:
    assert gate(row) == [reason]


def test_what_no_gate_asks_of_a_row() -> None:
    """No tensor core without a dot; no count of instructions where none was promised."""
    assert gate(replace(GOOD, dots=0, tensor_core=0, sass_a_weight=None)) == []
    assert gate(replace(GOOD, target="sm_89", sass_a_weight=9.0)) == []


def test_a_row_is_named_by_kernel_configuration_and_target() -> None:
    assert str(GOOD) == "nf4.nf4_linear [TOKENS=16; 4 warps, 3 stages] for sm_80"


def test_the_table_has_the_largest_and_every_row() -> None:
    rows = [GOOD, replace(GOOD, config="TOKENS=64", registers=90, shared=1024)]
    other = replace(GOOD, target="sm_90", sass_a_weight=None, stack=4)
    lines = markdown([*rows, other], ABOUT).splitlines()

    assert lines[2].startswith("3 compilations, 1 of them refused.")
    assert "| nf4.nf4_linear | sm_80 | 2 | 90 | 0 | 20.0 | 7.50 |" in lines
    assert "| nf4.nf4_linear | sm_90 | 1 | 80 | 0 | 20.0 |  |" in lines
    assert lines[-3:] == [
        "| TOKENS=16 | sm_80 | 80 | 0 | 0 | 20480 | 4 | 3 | 8 | 4 | 7.50 |",
        "|  | sm_90 | 80 | 4 | 0 | 20480 | 4 | 3 | 8 | 4 |  |",
        "| TOKENS=64 | sm_80 | 90 | 0 | 0 | 1024 | 4 | 3 | 8 | 4 | 7.50 |",
    ]
