"""What a compiled kernel must be like to ship, and on what grounds it is refused."""

from dataclasses import dataclass

MOST_SASS_A_WEIGHT = 8.5
"""In the NF4 main loop, on the targets whose figure the design is held to."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one target offers a program."""

    shared: int  # bytes
    tensor_core: str  # its instructions, for people
    takes_ptx: bool = True
    sass_a_weight: float | None = None


LIMITS = {
    "sm_80": Limits(163 * 1024, "HMMA", sass_a_weight=MOST_SASS_A_WEIGHT),
    "sm_86": Limits(99 * 1024, "HMMA"),
    "sm_89": Limits(99 * 1024, "HMMA"),
    "sm_90": Limits(227 * 1024, "HMMA or HGMMA", sass_a_weight=MOST_SASS_A_WEIGHT),
    "sm_100": Limits(227 * 1024, "HMMA or UTCMMA"),
    "gfx942": Limits(64 * 1024, "MFMA", takes_ptx=False),
}
TARGETS = tuple(LIMITS)


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel as compiled for one target in one configuration."""

    kernel: str  # the file in kernels/loraplex_kernels/gpu
    function: str
    config: str  # its constants
    arguments: str  # types, with what the launch let the compiler assume of them
    target: str
    case: str  # the first that launched it
    registers: int
    stack: int
    spills: int
    shared: int  # bytes a program
    warps: int
    stages: int  # of its pipelined loops
    dots: int  # in its source as Triton lowered it
    tensor_core: int
    wide: int
    atomics: int
    inline_ptx: int
    sass_a_weight: float | None  # of the loop that decodes NF4, where there is one
    diagnostics: tuple[str, ...]  # whatever a compiler wrote

    def __str__(self) -> str:
        options = f"{self.warps} warps, {self.stages} stages"
        return f"{self.kernel}.{self.function} [{self.config}; {options}] for {self.target}"


def gate(row: Row) -> list[str]:
    """Why the row may not ship; nothing if it may."""
    limits = LIMITS[row.target]
    reasons = [f"a compiler says: {said}" for said in row.diagnostics]
    if row.stack or row.spills:
        reasons.append(f"spills: {row.stack} bytes of stack, {row.spills} accesses")
    if row.shared > limits.shared:
        reasons.append(f"shared memory: {row.shared} of {limits.shared} bytes")
    if row.dots and not row.tensor_core:
        reasons.append(f"no {limits.tensor_core} although it holds a dot")
    if not row.wide:
        reasons.append("no 128-bit access to global memory")
    if row.atomics:
        reasons.append(f"{row.atomics} atomic instructions")
    if row.inline_ptx and not limits.takes_ptx:
        reasons.append(f"{row.inline_ptx} pieces of inline PTX")
    return reasons + _too_long(row, limits.sass_a_weight)


def _too_long(row: Row, most: float | None) -> list[str]:
    """Of the kernel that decodes NF4, in inline PTX, for its dots."""
    if most is None or not (row.inline_ptx and row.dots):
        return []
    if row.sass_a_weight is None:
        return ["the loop that decodes NF4 was not found"]
    too_long = row.sass_a_weight > most
    return [f"{row.sass_a_weight} SASS a weight, {most} at most"] if too_long else []
