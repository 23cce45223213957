"""What a compiled kernel is made of, read from its disassembly: SASS for NVIDIA, GCN for AMD."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

WARP, WARP_GROUP = 32, 128

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")

TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
WIDE_ACCESS = re.compile(r"\b(?:LDG|LDGSTS|STG)\.\S*\b128\b")
BULK_COPY = re.compile(r"\bUTMALDG\b|\bUTMASTG\b|\bUBLKCP\b")
ATOMIC = re.compile(r"\b(?:ATOMG?|REDG?)\b")
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")

GCN_TENSOR_CORE = re.compile(r"^\s*v_mfma_", re.MULTILINE)
GCN_WIDE_ACCESS = re.compile(
    r"^\s*(?:global|buffer|flat)_(?:load|store)\w*_dwordx4\b", re.MULTILINE
)
GCN_ATOMIC = re.compile(r"^\s*(?:global|buffer|flat)_atomic", re.MULTILINE)
GCN_SCRATCH = re.compile(r"^\s*scratch_(?:load|store)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes and does; counts are of instructions in its text."""

    registers: int  # a thread; on AMD vector registers, accumulation registers among them
    stack: int  # bytes a thread
    spills: int  # accesses to the stack; on AMD registers spilled, too
    tensor_core: int
    wide: int  # accesses to global memory of 128 bits a thread
    atomics: int


def of_sass(sass: str, usage: str) -> Resources:
    """From `nvdisasm -c` and `cuobjdump -res-usage` of a cubin that holds one kernel."""
    code = "\n".join(instructions(sass))
    taken = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        registers=taken["REG"],
        stack=taken["STACK"] + taken["LOCAL"],
        spills=_count(LOCAL_MEMORY, code),
        tensor_core=_count(TENSOR_CORE, code),
        wide=_count(WIDE_ACCESS, code) + _count(BULK_COPY, code),
        atomics=_count(ATOMIC, code),
    )


def of_gcn(assembly: str) -> Resources:
    """From the assembly of a code object, which ends with its metadata."""

    def noted(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no {name} in the code object's notes"
        return int(found[1])

    return Resources(
        registers=noted("vgpr_count"),
        stack=noted("private_segment_fixed_size"),
        spills=noted("vgpr_spill_count") + _count(GCN_SCRATCH, assembly),
        tensor_core=_count(GCN_TENSOR_CORE, assembly),
        wide=_count(GCN_WIDE_ACCESS, assembly),
        atomics=_count(GCN_ATOMIC, assembly),
    )


def instructions(sass: str) -> list[str]:
    found = map(INSTRUCTION.match, sass.splitlines())
    return [match[1] for match in found if match]


def loops(sass: str) -> list[list[str]]:
    """The instructions of every loop: from a label to a branch back to it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
            branch = BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                found.append(code[labels[branch[1]] :])
    return found


def weights_a_thread(loop: Sequence[str], tokens: int) -> float:
    """How many weights of `W x^T` a thread's part of a loop takes, by the shapes of its MMAs."""
    products = sum(_products(instruction) for instruction in loop)
    return products / tokens


def _products(instruction: str) -> float:
    """Multiplications a thread: `HMMA.16816` is 16 x 8 x 16 in a warp, HGMMA names its shape."""
    if match := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        return math.prod(map(int, match.groups())) / WARP_GROUP
    if match := re.search(r"\bHMMA\.(16816|1688)\b", instruction):
        return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[match[1]] / WARP
    return 0.0


def _count(pattern: re.Pattern[str], text: str) -> int:
    return sum(1 for _ in pattern.finditer(text))
