"""From a byte of two NF4 codes to two 16-bit floats: by byte permutes, or by table words.

Each level is stored as bf16 or fp16, rounded to nearest even. The high nibble is the even element.
"""

import struct

import torch
import triton
import triton.language as tl

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of NF4: quantiles of a normal distribution (Dettmers et al. 2023, appendix E)."""


def _bits(dtype: torch.dtype) -> list[int]:
    """The levels as 16-bit patterns."""
    return [bits & 0xFFFF for bits in torch.tensor(LEVELS).to(dtype).view(torch.int16).tolist()]


def _byte_words(dtype: torch.dtype, shift: int) -> list[int]:
    """Four int32 words: one byte of each of the 16 levels, four a word."""
    packed = bytes((bits >> shift) & 0xFF for bits in _bits(dtype))
    return list(struct.unpack("<4i", packed))


def _permute_asm(dtype: torch.dtype) -> str:
    """PTX that turns a word of four bytes into 16-bit floats: $0, $1 from the high nibbles.

    $2, $3 are those of the low nibbles. A byte permute (prmt) looks four codes up in 8 bytes of a
    table at once; the two halves of 16 entries are merged by each code's top bit, the two bytes of
    a float by another permute. A permute has room for one constant, so that the other word of each
    half is an operand: $5, $9, $13, $17, each followed by three copies for the pack's other bytes.
    """
    high, low = (_byte_words(dtype, shift) for shift in (8, 0))
    lines = [
        "{ .reg .b32 code, top, mask, lower, upper, high, low;",
        "and.b32 code, $4, 0x77777777;",
        "shr.b32 top, $4, 1;",
        "and.b32 top, top, 0x44444444;",
    ]
    for half, (even, odd) in enumerate((("$0", "$2"), ("$1", "$3"))):
        if half:
            lines += ["shr.b32 code, code, 16;", "shr.b32 top, top, 16;"]
        lines += ["prmt.b32 mask, 0, 0xff, top;"]
        for plane, words, first, second in (
            ("high", high, "$5", "$9"),
            ("low", low, "$13", "$17"),
        ):
            lines += [
                f"prmt.b32 lower, {first}, {_hex(words[1])}, code;",
                f"prmt.b32 upper, {second}, {_hex(words[3])}, code;",
                f"lop3.b32 {plane}, mask, upper, lower, 0xca;",  # mask ? upper : lower
            ]
        lines += [f"prmt.b32 {odd}, low, high, 0x6240;", f"prmt.b32 {even}, low, high, 0x7351;"]
    return "\n".join([*lines, "}"])


def _hex(word: int) -> str:
    return f"0x{word & 0xFFFFFFFF:08x}"


def _operands(dtype: torch.dtype) -> tuple[int, ...]:
    """The words that are operands, in their order."""
    high, low = (_byte_words(dtype, shift) for shift in (8, 0))
    return high[0], high[2], low[0], low[2]


_ASM_BF16 = tl.constexpr(_permute_asm(torch.bfloat16))
_ASM_FP16 = tl.constexpr(_permute_asm(torch.float16))
_CONSTRAINTS = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 16)
_OPERANDS_BF16 = tl.constexpr(_operands(torch.bfloat16))
_OPERANDS_FP16 = tl.constexpr(_operands(torch.float16))


@triton.jit
def permute_operands(memory, never, DTYPE: tl.constexpr):
    """The table words that `decode_by_permute` takes as operands, each int32 [1, 32].

    They come from loads that `never` (int1 [1, 32], false, which the assembler cannot know) keeps
    from happening: words that it knows to be constant or uniform it moves to a register before
    each use, which is more than one instruction a weight.
    """
    words: tl.constexpr = _OPERANDS_BF16 if DTYPE.is_bf16() else _OPERANDS_FP16
    at = memory.to(tl.pointer_type(tl.int32)) + tl.arange(0, 32)[None, :]
    return (
        tl.load(at, mask=never, other=words[0]),
        tl.load(at, mask=never, other=words[1]),
        tl.load(at, mask=never, other=words[2]),
        tl.load(at, mask=never, other=words[3]),
    )


@triton.jit
def decode_by_permute(packed, operands, DTYPE: tl.constexpr):
    """The even and the odd elements of `packed` (uint8 [n, 32]), both DTYPE [n, 32]. NVIDIA only.

    About three instructions a weight. Each element depends on its own byte alone, so that it is
    right whatever elements the compiler lets a thread hold.
    """
    asm: tl.constexpr = _ASM_BF16 if DTYPE.is_bf16() else _ASM_FP16
    even, odd = tl.inline_asm_elementwise(
        asm,
        _CONSTRAINTS,
        [packed, operands[0], operands[1], operands[2], operands[3]],
        dtype=(tl.int16, tl.int16),
        is_pure=True,
        pack=4,
    )
    return even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)


def _byte_tables(dtype: torch.dtype) -> tuple[int, ...]:
    """Four int64: the low bytes of levels 0-7 and 8-15, then their high bytes; eight a word."""
    planes = [bytes((bits >> shift) & 0xFF for bits in _bits(dtype)) for shift in (0, 8)]
    return struct.unpack("<4q", b"".join(planes))


_TABLES_BF16 = tl.constexpr(_byte_tables(torch.bfloat16))
_TABLES_FP16 = tl.constexpr(_byte_tables(torch.float16))


@triton.jit
def _look_up(code, DTYPE: tl.constexpr):
    """DTYPE level of each code 0..15 (int32), by shifts of 64-bit words of eight bytes."""
    tables: tl.constexpr = _TABLES_BF16 if DTYPE.is_bf16() else _TABLES_FP16
    is_upper = code >= 8
    shift = ((code & 7) * 8).to(tl.int64)
    low = tl.where(is_upper, _word(code, tables[1]), _word(code, tables[0])) >> shift
    high = tl.where(is_upper, _word(code, tables[3]), _word(code, tables[2])) >> shift
    bits = (high.to(tl.int32) << 8) | (low.to(tl.int32) & 0xFF)
    return bits.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _word(like, VALUE: tl.constexpr):
    return tl.full(like.shape, VALUE, tl.int64)


@triton.jit
def decode_by_shift(packed, DTYPE: tl.constexpr):
    """As `decode_by_permute`, on any device; about nine instructions a weight on gfx942.

    Half of what a tree of selects takes, and no gather, which goes through memory.
    """
    even = _look_up((packed >> 4).to(tl.int32), DTYPE)
    odd = _look_up((packed & 0xF).to(tl.int32), DTYPE)
    return even, odd
