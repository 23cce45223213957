"""Makes Triton's interpreter right where it is silently wrong: bf16, and the PTX in our kernels.

Triton 3.9 keeps bf16 as bit patterns in uint16 and computes with those as integers: sums, products,
comparisons, reductions and dots are garbage, and fp32 is cut off to bf16, not rounded. Inline
assembly it does not run at all. Each is mended only where a probe finds it broken. Two things that
take half of its time, each call's patching and the check of sums for overflow, are made cheap.
"""

import re
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from itertools import product
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter

Words = NDArray[np.uint32]


def repair() -> None:
    """Mend the interpreter of this process; nothing where there is nothing to mend."""
    builder = interpreter.InterpreterBuilder
    if _is_bf16_broken():
        for name in ("unary_op", "binary_op", "ternary_op", "create_fma"):
            setattr(builder, name, _in_fp32(getattr(builder, name)))
        for name in ("cast_impl", "create_fp_to_fp"):
            setattr(builder, name, _casting(getattr(builder, name)))
        for owner, names in (
            (interpreter.ReduceOps, ("sum", "min_max")),
            (interpreter.ScanOps, ("cumsum", "cumprod")),
        ):
            for name in names:
                setattr(owner, name, _reducing(getattr(owner, name)))
        builder.create_dot = _dot_in_fp32(builder.create_dot)
    if _lacks_inline_asm():
        builder.create_inline_asm = _create_inline_asm
    if _is_slow():
        interpreter._patch_lang = _patching_once(interpreter._patch_lang)
        interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow


def _is_bf16_broken() -> bool:
    """Whether 1 + 1 is not 2; seen so in Triton 3.9.0."""
    one = interpreter.TensorHandle(np.array([0x3F80], dtype=np.uint16), tl.bfloat16)
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        return False
    return bool(interpreter.interpreter_builder.create_fadd(one, one).data[0] != 0x4000)


def _lacks_inline_asm() -> bool:
    """As in Triton 3.9.0."""
    one = interpreter.TensorHandle(np.ones(1, dtype=np.int32), tl.int32)
    asm, constraints = "mov.b32 $0, $1;", "=r,r"
    try:
        interpreter.interpreter_builder.create_inline_asm(
            asm, constraints, [one], [tl.int32], True, 1
        )
    except NotImplementedError:
        return True
    return False


def _is_slow() -> bool:
    """As in Triton 3.9.0; versions with other insides are left as they are."""
    is_known = hasattr(interpreter, "_LangPatchScope")
    return is_known and interpreter._patch_lang.__module__ == interpreter.__name__


# bf16: widened to fp32, which is exact, and rounded again.


def _is_bf16(value: Any) -> bool:
    is_handle = isinstance(value, interpreter.TensorHandle)
    return is_handle and value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _widened(value: Any) -> Any:
    """The fp32 handle of a bf16 one; anything else as it is."""
    if not _is_bf16(value):
        return value
    bits = value.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(handle: Any) -> Any:
    """The bf16 handle of a floating one, to nearest even; a comparison's result as it is."""
    if not np.issubdtype(handle.data.dtype, np.floating):
        return handle
    values = np.ascontiguousarray(handle.data, dtype=np.float32).reshape(handle.data.shape)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nearest = np.where(np.isnan(values), np.uint32(0x7FC0), nearest)
    return interpreter.TensorHandle(nearest.astype(np.uint16), tl.bfloat16)


def _in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """For methods of handles whose result is of the handles' type, or a comparison."""

    @wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        if not any(map(_is_bf16, args)):
            return method(self, *args)
        return _rounded(method(self, *map(_widened, args)))

    return wrapper


def _dot_in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def wrapper(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        return method(self, _widened(a), _widened(b), acc, *options)

    return wrapper


def _casting(method: Callable[..., Any]) -> Callable[..., Any]:
    """For casts from and to bf16; narrower floats and other roundings are left alone."""
    ours = (tl.float16, tl.float32, tl.float64, *_INTEGERS)
    to_nearest = interpreter._ir.ROUNDING_MODE.RTNE

    @wraps(method)
    def wrapper(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        is_ours = not rounding or rounding[0] in (None, to_nearest)
        if not is_ours or not {source, target} - {tl.bfloat16} <= set(ours):
            return method(self, src, dst_type, *rounding)
        if target == tl.bfloat16 and source != tl.bfloat16:
            wide = src if source == tl.float32 else self.cast_impl(src, tl.float32)
            return _rounded(wide)
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = _widened(src)
            return wide if target == tl.float32 else self.cast_impl(wide, dst_type)
        return method(self, src, dst_type, *rounding)

    return wrapper


_INTEGERS = (
    tl.int1,
    *(getattr(tl, f"{sign}int{bits}") for sign, bits in product(("", "u"), (8, 16, 32, 64))),
)


def _reducing(method: Callable[..., Any]) -> Callable[..., Any]:
    """For reductions and scans of a bf16 tensor, rounded once at the end."""

    @wraps(method)
    def wrapper(self: Any, tensor: Any, *args: Any, **ops: Any) -> Any:
        if not _is_bf16(tensor.handle):
            return method(self, tensor, *args, **ops)
        wide = tl.tensor(_widened(tensor.handle), _with_element(tensor.type, tl.float32))
        result = method(self, wide, *args, **ops)
        if isinstance(result, (tuple, list)):
            return type(result)((_narrowed(result[0]), *result[1:]))
        return _narrowed(result)

    return wrapper


def _narrowed(tensor: Any) -> Any:
    if tensor.dtype != tl.float32:
        return tensor
    return tl.tensor(_rounded(tensor.handle), _with_element(tensor.type, tl.bfloat16))


def _with_element(kind: Any, element: Any) -> Any:
    return tl.block_type(element, kind.shape) if kind.is_block() else element


# Speed: what is done for every call of a device function, and for every sum of integers.


def _patching_once(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the language's functions the interpreter's, unless the launch has done so before."""

    def wrapper(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        functions = [f for module in modules for f in (module.load, module.tensor.__add__)]
        if functions and not any(map(tl.core.is_builtin, functions)):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    return wrapper


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
    """As Triton's own check, which does it by a dozen operations of the language."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not interpreter.interpreter_builder.options.sanitize_overflow:
        return
    name, operands = binary_op.__name__, [side.handle.data.astype(np.int64) for side in (lhs, rhs)]
    exact = _EXACT[name](*operands)
    is_within = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert is_within, f"int{kind.int_bitwidth} overflow detected for operation {name}"


# Inline assembly: the PTX instructions of `nf4_decode`, on words of 32 bits.


def _permute(low: Words, high: Words, selector: Words) -> Words:
    """prmt: each nibble of the selector picks one of eight bytes, or spreads that byte's sign."""
    low, high, selector = np.broadcast_arrays(low, high, selector)
    table = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(table.shape, dtype=np.uint32)
    for place in range(4):
        choice = selector >> np.uint32(4 * place)
        byte = (table >> ((choice & 7) * 8).astype(np.uint64)).astype(np.uint32) & 0xFF
        sign = np.where(byte & 0x80, 0xFF, 0).astype(np.uint32)
        result |= np.where(choice & 8, sign, byte) << np.uint32(8 * place)
    return result


def _logic(a: Words, b: Words, c: Words, table: Words) -> Words:
    """lop3: bit `4 a + 2 b + c` of the table, for every bit of a, b and c."""
    terms = [
        (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        for row in range(8)
        if int(table) >> row & 1
    ]
    return reduce(np.bitwise_or, terms, np.zeros_like(a))


_INSTRUCTIONS: dict[str, Callable[..., Words]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "shr.b32": np.right_shift,
    "prmt.b32": _permute,
    "lop3.b32": _logic,
}


def run_ptx(asm: str, num_outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """The registers `$0`.. after straight-line PTX, its inputs being the registers after those."""
    registers = {f"${num_outputs + index}": words for index, words in enumerate(inputs)}
    for statement in re.sub(r"[{}]", "", asm).split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if name not in _INSTRUCTIONS:
            raise NotImplementedError(f"the interpreter does not know the PTX {name}")
        target, *operands = (operand.strip() for operand in rest.split(","))
        values = [
            registers[operand] if operand in registers else np.uint32(int(operand, 0))
            for operand in operands
        ]
        registers[target] = _INSTRUCTIONS[name](*values).astype(np.uint32)
    return [registers[f"${index}"] for index in range(num_outputs)]


class _Results:
    """What the front end takes the outputs from."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


def _create_inline_asm(
    self: Any,
    asm: Any,
    constraints: Any,
    values: Sequence[Any],
    types: Sequence[Any],
    is_pure: bool,
    pack: int,
) -> _Results:
    """`pack` neighbours at a time, in as many words as they fill."""
    asm, constraints = (str(getattr(text, "value", text)) for text in (asm, constraints))
    shape = values[0].data.shape
    inputs = [words for value in values for words in _words(value.data, pack)]
    outputs = run_ptx(asm, constraints.count("="), inputs)
    handles = []
    for kind in types:
        dtype = interpreter._get_np_dtype(kind.scalar)
        count = pack * dtype.itemsize // 4
        data = np.stack(outputs[:count], axis=1).view(dtype).reshape(shape)
        del outputs[:count]
        handles.append(interpreter.TensorHandle(data, kind.scalar))
    return _Results(handles)


def _words(data: NDArray[Any], pack: int) -> list[Words]:
    """The n-th word of each pack of neighbours, for every n."""
    flat = np.ascontiguousarray(data).reshape(-1)
    words: Words = flat.view(np.uint32).reshape(flat.size // pack, -1)
    return list(words.T)
