"""Compile what the launchers launch for a GPU that is not there, and print what came out.

A process for one target, run by kernel_report.py and by tests: a JSON object a line, which is
`{"row": ...}` with a `gates.Row`, `{"failure": ...}` with why something does not compile, or
`{"case": [done, of all]}`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from disassembly import Resources, loops, of_gcn, of_sass, weights_a_thread
from gates import TARGETS, Row
from loraplex_kernels.cases import SERVING, Case, Scale, cases
from loraplex_kernels.gpu.launch import LAUNCH_OPTIONS, Grid
from loraplex_kernels.gpu.ops import TritonOps
from loraplex_kernels.gpu.paths import EVERY_KERNEL
from model_shapes import LLAMA_3_8B, OTHER_HEADS, QWEN_2_5_7B
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

NVIDIA_TOOLS: Path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

META = torch.device("meta")
"""Tensors without memory, whose pointers are aligned as an allocator's: all a compiler asks for."""

SUBSET = Scale(decode_rows=(16,), prefill_rows=512, context=1024, linears=("gate_up", "down"))
"""Every kernel, in less than a quarter of the time."""

PTXAS_REPORT = re.compile(
    r"ptxas\S* info\s+: (?:\d+ bytes gmem|Compiling entry|Function properties|Used \d+ reg)"
    r"|ptxas\S* info\s+: Compile time|\s*\d+ bytes stack frame, |\s*$"
)
"""Lines that ptxas -v always writes. Not every other `info` is harmless."""

PTX_OPERAND_TYPE = re.compile(r"\.(?:b|u|s|f)(?:8|16|32|64)\b")


class TargetOnly:
    """A Triton driver of a device of which only the type is known."""

    def __init__(self, target: str) -> None:
        is_cuda = target.startswith("sm_")
        self._target = (
            GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
            if is_cuda
            else GPUTarget("hip", target, 64)
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiler:
    """A `launch.Launch` that compiles exactly what a launch would run, and runs nothing.

    Mutable: `case`, set by who runs it; `_seen`, hashes and errors; and `messages`, with a row for
    each compilation that differs from all before.
    """

    def __init__(self, target: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self.case = ""
        self._target = target
        self._seen: set[str] = set()

    def __call__(self, kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
        if not all(grid):
            return
        compiled, said = None, ""
        with _captured() as output:
            try:
                compiled = kernel.warmup(*args, grid=grid, **LAUNCH_OPTIONS, **meta)
            except Exception as error:  # of many types, by the stage that fails
                said = _told(error)
        if compiled is None:
            self._refused(kernel.fn.__name__, f"{said}\n{output[0]}".strip())
        elif compiled.hash not in self._seen:
            self._seen.add(compiled.hash)
            self.messages.append({"row": asdict(self._row(kernel, compiled, output[0]))})

    def _refused(self, name: str, said: str) -> None:
        """Once for each way to be refused, however many shapes meet it."""
        if said not in self._seen:
            self._seen.add(said)
            why = f"{name} for {self._target} does not compile ({self.case}): {said}"
            self.messages.append({"failure": why})

    def _row(self, kernel: Any, compiled: Any, said: str) -> Row:
        resources, sass = _disassembled(compiled)
        constants = _constants(kernel, compiled)
        config = " ".join(f"{name}={value}" for name, value in constants.items())
        ttir = compiled.asm["ttir"]
        return Row(
            kernel=kernel.fn.__module__.rpartition(".")[2],
            function=kernel.fn.__name__.lstrip("_"),
            config=config.replace(", ", ","),
            arguments=_arguments(kernel, compiled),
            target=self._target,
            case=self.case,
            shared=compiled.metadata.shared,
            warps=compiled.metadata.num_warps,
            stages=compiled.metadata.num_stages,
            dots=len(re.findall(r"\btt\.dot\b", ttir)),
            inline_ptx=_inline_ptx(ttir),
            sass_a_weight=_sass_a_weight(sass, constants),
            diagnostics=diagnostics(said),
            **asdict(resources),
        )


def _told(error: BaseException) -> str:
    """With its causes: Triton raises one for each function that was being inlined."""
    cause = "" if error.__cause__ is None else f"\n{_told(error.__cause__)}"
    return f"{type(error).__name__}: {error}{cause}"


def diagnostics(said: str) -> tuple[str, ...]:
    """The lines in a compiler's output that it does not always write."""
    return tuple(line for line in said.splitlines() if not PTXAS_REPORT.match(line))


def compile_all(target: str, kernels: Sequence[str], is_subset: bool) -> Iterator[dict[str, Any]]:
    """Everything that is launched by the cases, and how far we are."""
    driver.set_active(TargetOnly(target))
    compiler = Compiler(target)
    ops = TritonOps(META, target, EVERY_KERNEL, launch=compiler)
    wanted = [(model, case) for model, case in _cases(is_subset) if case.kernel in kernels]
    for done, (model, case) in enumerate(wanted, start=1):
        compiler.case = f"{model}: {case.kernel}, {case.name}, {case.num_rows} rows"
        case.prepare().call(ops)
        yield from compiler.messages
        compiler.messages.clear()
        yield {"case": [done, len(wanted)]}


def _cases(is_subset: bool) -> Iterator[tuple[str, Case]]:
    """Of each model what the ones before it do not have; Mistral-7B has Llama-3-8B's shapes."""
    for shapes in (LLAMA_3_8B,) if is_subset else (LLAMA_3_8B, QWEN_2_5_7B, *OTHER_HEADS):
        scale = SUBSET if is_subset else SERVING
        if shapes is QWEN_2_5_7B:
            scale = replace(scale, linears=("qkv", "down"))
        for case in cases(shapes, META, torch.bfloat16, scale=scale, fill=False):
            if shapes not in OTHER_HEADS or case.kernel in ("attention", "rotary_and_cache"):
                yield shapes.name, case


def _constants(kernel: Any, compiled: Any) -> dict[str, Any]:
    """The constexprs by name, without arguments that are None or that Triton made constant."""
    declared = {kernel.arg_names[index] for index in kernel.constexprs}
    named = {kernel.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    return {name: value for name, value in named.items() if name in declared}


def _arguments(kernel: Any, compiled: Any) -> str:
    """`x:*bf16/16` is a pointer aligned to 16; constants are left out."""
    parts = []
    for index, name in enumerate(kernel.arg_names):
        kind = compiled.src.signature[name]
        attributes = {key for key, _ in compiled.src.attrs.get((index,), [])}
        if kind != "constexpr":
            aligned = "/16" if "tt.divisibility" in attributes else ""
            ranged = "/2GB" if "tt.pointer_range" in attributes else ""
            parts.append(f"{name}:{kind}{aligned}{ranged}")
    return " ".join(parts)


def _disassembled(compiled: Any) -> tuple[Resources, str]:
    """What it takes, and its SASS; no SASS for AMD."""
    if "cubin" not in compiled.asm:
        return of_gcn(compiled.asm["amdgcn"]), ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name)
        sass = _output(NVIDIA_TOOLS / "nvdisasm", "-c", "-ndf", file.name)
    return of_sass(sass, usage), sass


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _inline_ptx(ttir: str) -> int:
    pieces = re.findall(r'tt\.elementwise_inline_asm "((?:[^"\\]|\\.)*)"', ttir)
    return sum(1 for piece in pieces if PTX_OPERAND_TYPE.search(piece))


def _sass_a_weight(sass: str, constants: dict[str, Any]) -> float | None:
    """Of the loop that decodes NF4 and multiplies: instructions over weights, both a thread's.

    The loops over an adapter's ranks multiply too, without a byte permute for each weight.
    """
    if "TOKENS" not in constants:
        return None
    taken = [(loop, weights_a_thread(loop, constants["TOKENS"])) for loop in loops(sass)]
    counts = [
        len(loop) / weights
        for loop, weights in taken
        if 0 < weights <= sum("PRMT" in instruction for instruction in loop)
    ]
    return round(max(counts), 2) if counts else None


@contextmanager
def _captured() -> Iterator[list[str]]:
    """What anything in this process writes to stdout or stderr, compilers in C++ too.

    It is the list's only element once the block is left.
    """
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="compiling.py", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--kernels", required=True, help="of gpu.ops.KERNELS, with commas")
    parser.add_argument("--subset", action="store_true", help="fewer shapes of one model")
    args = parser.parse_args(argv)
    for message in compile_all(args.target, args.kernels.split(","), args.subset):
        print(json.dumps(message), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
