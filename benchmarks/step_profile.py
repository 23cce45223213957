"""Where does each millisecond of a decode step go, and how far is it from what the bytes allow?

python benchmarks/step_profile.py --help
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_files import linears_of, write_adapter
from command import Findings, build_parser, number, progress, run_command, table
from lifecycle import model_folder
from loraplex.adapters.packing import Layout, pack
from loraplex.adapters.peft import BaseLinear, read_adapter, read_config
from loraplex.config import ServeConfig, cache_dir
from loraplex.engine.batch import DeviceMemory, build_input
from loraplex.engine.model_runner import block_shape
from loraplex.engine.sampler import confirm, sample
from loraplex.engine.sequence import SamplingParams, StopParams
from loraplex.engine.sequence import Sequence as EngineSequence
from loraplex.engine.step import Scheduled
from loraplex.model.config import MODULES
from loraplex.model.decoder import Activations
from loraplex.startup import Base, load_base
from loraplex_kernels.native.stack import PHASES, NativeStack
from loraplex_kernels.pages import prefer_large_pages
from loraplex_kernels.tables import AdapterTables
from torch import Tensor

DESCRIPTION = """\
Decode steps of the model itself in this process: batches of 1, 8 and 32 rows, greedy, with 0, 1,
8, 16 and 32 adapters of rank 16 on all modules, spread evenly over the rows. Times are medians: the
parts of the one native call (or the layers as a whole, where they are separate ops), what is
around it, and the whole step; beside them the floor, which is the bytes that a step must read at
the measured bandwidth, and the time of its multiplications at the measured rate of large products.
"""

EPILOG = """\
examples:
  python benchmarks/step_profile.py --save step_profile
  python benchmarks/step_profile.py --context 1024 --steps 20
"""

BATCHES = (1, 8, 32)
ADAPTERS = (0, 1, 8, 16, 32)
RANK = 16


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one step."""

    build: float  # the input's tensors
    phases: Mapping[str, float]  # of PHASES; empty where the layers are separate ops
    forward: float
    sample: float
    total: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What this one can do at best."""

    read_bytes_per_second: float
    multiplications_per_second: float


class Steps:
    """A model, resident adapters, and decode rows over a cache. Mutable: the cache."""

    def __init__(self, base: Base, adapters: Sequence[Path], context: int) -> None:
        self._base = base
        self._context = context
        model, dtype, device = base.config, base.decoder.dtype, base.device.where
        shape = block_shape(model, dtype, dtype)
        form = base.ops.granule_form(dtype)
        packed = []
        for folder in adapters:
            config = read_config((folder / "adapter_config.json").read_text(), RANK)
            weights = folder / "adapter_model.safetensors"
            linears = {each.name: BaseLinear(*each) for each in model.linears()}
            spec = read_adapter(weights, config, linears, RANK)
            layout = Layout(shape.size, dtype, form)
            packed.append(pack(weights, spec, layout, base.decoder.base_weight))
        self._blocks_a_row = -(-(context + 1) // shape.tokens)
        num_kv = max(BATCHES) * self._blocks_a_row
        num_blocks = num_kv + sum(each.num_blocks for each in packed)
        arena = torch.empty(num_blocks * shape.size, dtype=torch.uint8, device=device)
        prefer_large_pages(arena)
        arena.zero_()
        tables = AdapterTables(max(1, len(packed)), model.num_layers, len(MODULES), RANK, device)
        self._memory = DeviceMemory(arena, dtype, form, tables, shape.tokens, base.ops.uses_tiles)
        self._cache = arena.view(dtype).view(
            num_blocks, model.num_layers, 2, model.num_kv_heads, shape.tokens, model.head_dim
        )
        first = num_kv
        for slot, each in enumerate(packed):
            blocks = range(first, first + each.num_blocks)
            arena.view(num_blocks, shape.size)[blocks.start : blocks.stop] = each.data
            self._memory.bind(slot, each.placed(blocks))
            first += each.num_blocks
        self._activations = Activations.allocate(model, dtype, device, max(BATCHES), max(BATCHES))
        self.kv_bytes_a_row = context * shape.size // shape.tokens

    def rows(self, batch: int, num_adapters: int) -> list[Scheduled]:
        rows = []
        for index in range(batch):
            slot = index * num_adapters // batch if num_adapters else None
            tokens = [(17 * index + position) % 1000 for position in range(self._context)]
            sequence = EngineSequence(
                f"row {index}", tokens, SamplingParams(temperature=0.0), StopParams(1), slot=slot
            )
            first = index * self._blocks_a_row
            sequence.block_table = list(range(first, first + self._blocks_a_row))
            rows.append(Scheduled(sequence, self._context - 1, 1, samples=True))
        return rows

    def measure(self, rows: Sequence[Scheduled], num_steps: int) -> Times:
        """Medians of each part over the steps; the phases are means, which add up."""
        decoder, ops = self._base.decoder, self._base.ops
        fused = decoder.fused(ops)
        times: list[tuple[float, float, float]] = []
        with torch.inference_mode():
            for index in range(num_steps + 2):
                if index == 2 and isinstance(fused, NativeStack):  # the first two warm up
                    fused.start_profile()
                start = time.perf_counter()
                step = build_input(rows, self._memory)
                built = time.perf_counter()
                if decoder.chooses(step, ops):
                    tokens = decoder.choose(step, self._cache, ops, self._activations)
                    computed = time.perf_counter()
                    confirm(tokens.tolist(), rows)
                else:
                    logits = decoder.forward(step, self._cache, ops, self._activations)
                    computed = time.perf_counter()
                    sample(logits, rows)
                times.append((built - start, computed - built, time.perf_counter() - computed))
        build, forward, sampled = (
            1e3 * statistics.median(each) for each in zip(*times[2:], strict=True)
        )
        total = 1e3 * statistics.median(map(sum, times[2:]))
        phases = fused.profile() if isinstance(fused, NativeStack) else {}
        scaled = {name: 1e3 * seconds / num_steps for name, seconds in phases.items()}
        return Times(build, scaled, forward, sampled, total)


def main(argv: Sequence[str]) -> int:
    parser = build_parser("step_profile.py", DESCRIPTION, EPILOG)
    steps = parser.add_argument_group("steps")
    number(steps, "--steps", 100, "of each kind")
    number(steps, "--context", 96, "tokens that each row sees")
    return run_command(parser, _benchmark, argv)


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        config = ServeConfig(
            store=work / "store",
            cache=cache_dir(),
            model=str(model),
            device="cpu",
            dtype=args.dtype,
            threads=args.threads,
        )
        base = load_base(config)
        machine = _machine()
        adapters = [work / f"adapter-{index}" for index in range(max(ADAPTERS))]
        for index, folder in enumerate(adapters):
            write_adapter(folder, linears_of(model), RANK, seed=args.seed * 1000 + index)
        steps = Steps(base, adapters, args.context)
    kinds = [(batch, count) for batch in BATCHES for count in ADAPTERS if count <= batch]
    found: dict[tuple[int, int], Times] = {}
    for batch, count in kinds:
        found[batch, count] = steps.measure(steps.rows(batch, count), args.steps)
        progress(f"batch {batch}, {count} adapters: {found[batch, count].total:.2f} ms")
    floors = {kind: _floor(base, machine, steps.kv_bytes_a_row, *kind) for kind in kinds}
    return _findings(found, floors, machine)


def _machine() -> Machine:
    numbers = torch.ones(64 << 20)  # 256 MB
    seconds = _best(numbers.sum)
    a = torch.randn(2048, 2048).bfloat16()
    return Machine(numbers.nbytes / seconds, 2048**3 / _best(lambda: a @ a))


def _best(call: Callable[[], Tensor]) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once() for _ in range(7))


def _floor(
    base: Base, machine: Machine, kv_bytes_a_row: int, batch: int, num_adapters: int
) -> tuple[float, float]:
    """Milliseconds for the bytes and for the multiplications of a step."""
    model = base.config
    shapes = [(s.out_features, s.in_features) for s in model.linears()]
    linears = sum(n * k for n, k in shapes)
    head = model.vocab_size * model.hidden_size
    is_fused = base.decoder.fused(base.ops) is not None
    head_weight = 1 if is_fused else base.decoder.dtype.itemsize  # greedy steps read int8
    features = sum(n + k for n, k in shapes)
    moved = linears // 2 + 4 * linears // 64 + head * head_weight
    moved += num_adapters * RANK * features * base.decoder.dtype.itemsize + batch * kv_bytes_a_row
    products = batch * (linears + head + (RANK * features if num_adapters else 0))
    return (
        1e3 * moved / machine.read_bytes_per_second,
        1e3 * products / machine.multiplications_per_second,
    )


def _findings(
    found: Mapping[tuple[int, int], Times],
    floors: Mapping[tuple[int, int], tuple[float, float]],
    machine: Machine,
) -> Findings:
    names = [name for name in PHASES if any(name in times.phases for times in found.values())]
    header = ["batch, adapters", *names, "forward", "input", "sampling", "step"]
    header += ["floor: bytes", "products", "tokens/s"]
    rows = [
        [
            f"{batch}, {count}",
            *(f"{times.phases[name]:.2f}" for name in names),
            *(f"{each:.2f}" for each in (times.forward, times.build, times.sample, times.total)),
            *(f"{each:.2f}" for each in floors[batch, count]),
            f"{1e3 * batch / times.total:.0f}",
        ]
        for (batch, count), times in found.items()
    ]
    text = (
        f"{table(header, rows)}\n\nMilliseconds. Reads at "
        f"{machine.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"{2e-12 * machine.multiplications_per_second:.2f} TFLOPS in large products."
    )
    figures = {
        "read_bytes_per_second": machine.read_bytes_per_second,
        "multiplications_per_second": machine.multiplications_per_second,
        "steps": [
            {
                "batch": batch,
                "adapters": count,
                "milliseconds": {
                    **times.phases,
                    "forward": times.forward,
                    "input": times.build,
                    "sampling": times.sample,
                    "step": times.total,
                },
                "floor_milliseconds": dict(
                    zip(("bytes", "products"), floors[batch, count], strict=True)
                ),
            }
            for (batch, count), times in found.items()
        ],
    }
    return Findings(text, figures, [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
