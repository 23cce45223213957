"""How long each Triton op takes on this GPU, beside the time that its bytes alone would take.

python benchmarks/kernel_speed.py --help
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from environment import environment
from kernel_lines import OURS, PATHS, TORCH, Line, Wanted, lines, timed
from kernel_report import REPORT, read
from kernel_table import largest
from kernel_times import as_json, conditions, floors, times
from loraplex_kernels.gpu.ops import KERNELS, TritonOps
from loraplex_kernels.gpu.paths import UNMEASURED, LinearPath, PathTable
from loraplex_kernels.gpu.target import target_of
from loraplex_kernels.ops import Ops
from loraplex_kernels.reference import TorchOps
from loraplex_kernels.timing import CudaTimer, copy_bytes_per_second
from model_shapes import MODELS
from popularity import POPULARITIES
from rich.progress import track
from sources import source_hash

RESULTS = Path(__file__).resolve().parent / "results"

EPILOG = """\
floor          the bytes that the op must touch, once, at the speed of a device-to-device copy
fused          our NF4 kernel with LoRA in its epilogue, up to 64 rows
bitsandbytes   its own choice of kernels for the base, then our LoRA kernels
dequantized    the weight once into a scratch, a dense product, then our LoRA kernels
torch          the reference ops: bitsandbytes' base and a loop over the adapters
popularity     distinct, uniform (about sqrt(rows) adapters), zipf, identical, skewed (one adapter
               has nine rows of ten)

Without a GPU nothing is run: the bytes, what they would take at three devices' stated bandwidth,
and the compiled kernels' resources. `loraplex check` says whether the results are right.

examples:
  python benchmarks/kernel_speed.py --models Llama-3-8B --kernels lora --rows 32
  python benchmarks/kernel_speed.py --save h100
"""

NO_GPU = """\
No GPU here: nothing below was run. Bytes are each op's least, and microseconds are those bytes over
the memory bandwidth that NVIDIA states (H100 3.35, A100 2.04, L4 0.30 TB/s): arithmetic."""


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, or 130 after Ctrl-C."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if args.save is not None and not torch.cuda.is_available():
        parser.error("--save keeps what was measured, and there is no GPU here")
    command = shlex.join(["python", "benchmarks/kernel_speed.py", *argv])
    try:
        record, text = _benchmark(args, command)
    except KeyboardInterrupt:
        return 130
    as_text = json.dumps(record, indent=1) + "\n"
    sys.stdout.write(as_text if args.json else text)
    if args.save is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.json").write_text(as_text, encoding="utf-8")
        (RESULTS / f"{args.save}.md").write_text(text, encoding="utf-8")
    return 0


def _benchmark(args: argparse.Namespace, command: str) -> tuple[dict[str, Any], str]:
    """For programs, and for people."""
    models = [MODELS[name] for name in args.models]
    wanted = Wanted(args.kernels, args.rows, args.ranks, args.popularity)
    about = {"command": command, **environment()}
    if not torch.cuda.is_available():
        found = [line for line, _ in lines(models, wanted, torch.device("meta"), torch.bfloat16)]
        note, resources = _compiled()
        record: dict[str, Any] = {"environment": about, "device": None, "lines": as_json(found)}
        parts = [NO_GPU, floors(found), note, resources, "No GPU here: nothing of this was run."]
        return record, "\n\n".join(parts) + "\n"
    device = torch.device("cuda")
    bandwidth = copy_bytes_per_second(device)
    found = list(_measured(args, wanted, device, bandwidth))
    name = torch.cuda.get_device_name(device)
    record = {
        "environment": about,
        "device": name,
        "copy_bytes_per_second": bandwidth,
        "lines": as_json(found),
    }
    head = f"{name}, a copy moves {bandwidth / 1e9:.0f} GB/s. {conditions(about, 'bfloat16')}"
    return record, f"{head}\n\n{times(found, bandwidth)}\n"


def _measured(
    args: argparse.Namespace, wanted: Wanted, device: torch.device, bandwidth: float
) -> Iterator[Line]:
    ways = ways_on(device)
    timer = CudaTimer(device, bandwidth)
    models = [MODELS[name] for name in args.models]
    asked = list(lines(models, wanted, device, torch.bfloat16))
    is_quiet = not sys.stderr.isatty()
    for line, case in track(asked, "timing", disable=is_quiet, transient=True):
        yield timed(line, case, ways, timer)


def ways_on(device: torch.device) -> dict[str, Ops]:
    """By the names of kernel_lines; all ways of the base but torch's share our LoRA kernels."""
    target = target_of(device)
    by_path = {
        path: TritonOps(device, target, PathTable({}, ((1, LinearPath(path)),))) for path in PATHS
    }
    return {**by_path, OURS: TritonOps(device, target, UNMEASURED), TORCH: TorchOps()}


def _compiled() -> tuple[str, str]:
    """What is known of the kernels without running them: the committed report."""
    about, rows = read(REPORT)
    is_current = about["sources"] == source_hash()
    note = (
        "Compiled ahead of time, from these sources; the largest configuration of each kernel:"
        if is_current
        else "Compiled ahead of time, from OTHER sources (`make kernels-report` compiles these):"
    )
    return note, largest(rows)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernel_speed.py",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def chosen(flag: str, known: Sequence[str], what: str) -> None:
        parser.add_argument(
            flag,
            type=_list_of(known),
            default=list(known),
            metavar="NAME,...",
            help=f"{what} (default: {','.join(known)})",
        )

    def numbers(flag: str, default: str, what: str) -> None:
        help_ = f"{what} (default: %(default)s)"
        parser.add_argument(flag, type=_numbers, default=default, metavar="N,...", help=help_)

    chosen("--models", list(MODELS), "whose shapes")
    chosen("--kernels", KERNELS, "which ops")
    chosen("--popularity", POPULARITIES, "how rows are spread over adapters")
    numbers("--rows", "1,8,32,64", "tokens in a batch, one a sequence")
    numbers("--ranks", "16,64", "of every adapter, on all seven linears")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument(
        "--save",
        type=_result,
        metavar="NAME",
        help="also benchmarks/results/NAME.json, and the table as NAME.md",
    )
    return parser


def _list_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            choices = ", ".join(known)
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {choices}")
        return names

    return parse


def _result(name: str) -> str:
    if name == REPORT.name:
        raise argparse.ArgumentTypeError(f"results/{name} is what `make kernels-report` writes")
    return name


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,8,32")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
