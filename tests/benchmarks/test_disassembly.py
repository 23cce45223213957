"""Counts from SASS and GCN text, on excerpts of real disassemblies."""

import pytest
from disassembly import Resources, loops, of_gcn, of_sass, weights_a_thread

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function gemm:
  REG:210 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """
.text.gemm:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0400*/                   LDGSTS.E.BYPASS.128 [R4], [R192.64], P2 ;
        /*0410*/              @!P2 LDG.E.U16 R96, [R84.64] ;
        /*0420*/                   LDG.E.EL.128 R8, desc[UR6][R4.64] ;
.L_x_1:
        /*0430*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0440*/              @P0  BRA `(.L_x_3) ;
.L_x_2:
        /*0450*/                   LDL R3, [R1+0x8] ;
        /*0460*/                   REDUX.SUM UR4, R3 ;
        /*0470*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0480*/              @!P1 BRA `(.L_x_2) ;
        /*0490*/                   STL [R1+0x8], R3 ;
        /*04a0*/                   LDSM.16.M88.4 R4, [R9] ;
        /*04b0*/              @P2  BRA `(.L_x_1) ;
.L_x_3:
        /*04c0*/                   STG.E.128 desc[UR6][R2.64], R8 ;
        /*04d0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R7 ;
        /*04e0*/                   ATOMG.E.CAS.STRONG.GPU PT, R2, [R6], R4, R5 ;
        /*04f0*/                   EXIT ;
"""


def test_what_sass_is_counted_as() -> None:
    assert of_sass(SASS, USAGE) == Resources(
        registers=210, stack=24, spills=2, tensor_core=2, wide=3, atomics=2
    )


@pytest.mark.parametrize(
    "instruction",
    [
        "HMMA.16816.F32 R8, R4, R6, R8",
        "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, !UPT",
        "UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8], tmem[UR4], idesc[UR5], !UPT",
    ],
)
def test_every_generation_of_tensor_cores_counts(instruction: str) -> None:
    assert of_sass(f"        /*0000*/   {instruction} ;", USAGE).tensor_core == 1


def test_loops_end_at_their_branches_back() -> None:
    inner, outer = loops(SASS)

    assert [line.split()[0] for line in inner] == [
        "LDL",
        "REDUX.SUM",
        "HMMA.16816.F32.BF16",
        "@!P1",
    ]
    assert len(outer) == 9
    assert outer[-1] == "@P2  BRA `(.L_x_1)"


@pytest.mark.parametrize(
    ("instruction", "tokens", "weights"),
    [
        # 16 x 16 weights of a warp by 8 of 16 tokens, and by all 8.
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 16, 4.0),
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", 8, 8.0),
        # 64 x 16 weights of four warps by all 16 tokens.
        ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, !UPT", 16, 8.0),
        ("IMAD R1, R2, R3, R4", 16, 0.0),
    ],
)
def test_weights_of_a_loop(instruction: str, tokens: int, weights: float) -> None:
    assert weights_a_thread([instruction], tokens) == weights


GCN = """
gemm:
	buffer_load_dwordx4 v[2:5], v11, s[28:31], 0 offen
	buffer_load_ushort v79, v80, s[4:7], 0 offen
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	global_store_dwordx4 v[0:1], v[4:7], off
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	scratch_store_dword off, v3, off
	global_atomic_add_f32 v1, v2, s[0:1]
amdhsa.kernels:
  - .agpr_count:     0
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 4
    .vgpr_count:     103
    .vgpr_spill_count: 2
"""


def test_what_gcn_is_counted_as() -> None:
    """Scalar registers spill into lanes of vector registers, not into memory."""
    assert of_gcn(GCN) == Resources(
        registers=103, stack=12, spills=3, tensor_core=1, wide=2, atomics=1
    )
