"""What the compile report makes of a compiler's words and of the sources it hashes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from compiling import _inline_ptx, diagnostics
from gates import Row
from kernel_report import Report, main, read, write

PTXAS = """
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_merge' for 'sm_80'
ptxas info    : Function properties for _merge
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 59 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Compile time = 20.865 ms
"""

ROW = Row(
    kernel="silu",
    function="silu_mul",
    config="SIZE=64",
    arguments="x:*bf16/16",
    target="sm_80",
    case="tiny: silu_mul, rows, 8 rows",
    registers=20,
    stack=0,
    spills=0,
    shared=0,
    warps=4,
    stages=3,
    dots=0,
    tensor_core=0,
    wide=3,
    atomics=0,
    inline_ptx=0,
    sass_a_weight=None,
    diagnostics=(),
)


def test_what_ptxas_always_says_is_no_diagnostic() -> None:
    assert diagnostics(PTXAS) == ()
    assert diagnostics(PTXAS.replace("ptxas info", "ptxas-blackwell info")) == ()


@pytest.mark.parametrize(
    "said",
    [
        "ptxas warning : Registers are spilled to local memory in function '_merge'",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources",
        "remark: cannot vectorise",
    ],
)
def test_everything_else_is_one(said: str) -> None:
    assert diagnostics(f"{PTXAS}{said}\n") == (said,)


def test_ptx_is_told_from_the_assembly_of_amd() -> None:
    ptx = r'tt.elementwise_inline_asm "{ .reg .b32 a;\0Aprmt.b32 a, $1, \22, $2; }" {packed = 4}'
    gcn = 'tt.elementwise_inline_asm "v_perm_b32 $0, $1, $2, $3" {packed = 4}'

    assert _inline_ptx(f"{ptx}\n{gcn}\n{ptx}") == 2
    assert _inline_ptx(gcn) == 0


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, diagnostics=("a", "b"), spills=1)]

    write(Report(rows, []), tmp_path / "report", "make it")

    about, found = read(tmp_path / "report")
    assert found == rows
    assert about["command"] == "make it"
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert sum('"kernel": "silu"' in line for line in lines) == 2, "a row a line"
    assert json.loads("\n".join(lines))["rows"][1]["spills"] == 1
    assert "2 compilations, 1 of them refused" in (tmp_path / "report.md").read_text()


def test_everything_refused_is_named() -> None:
    report = Report([replace(ROW, wide=0)], ["merge for sm_80 does not compile"])

    assert report.refused() == [
        "merge for sm_80 does not compile",
        "silu.silu_mul [SIZE=64; 4 warps, 3 stages] for sm_80: no 128-bit access to global memory",
    ]


def test_unknown_names_are_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--targets", "sm_80,sm_75"])

    assert "sm_75: not of" in capsys.readouterr().err
