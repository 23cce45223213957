"""The `loraplex` command: the client's commands, and the server's where its extra is installed."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

# gRPC's own notes would stand between a user and our one line; it reads this when imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from loraplex_client import cli as client
from loraplex_client.cli_options import UsageError

from loraplex.config import (
    DEFAULT_MODEL,
    Address,
    ServeConfig,
    cache_dir,
    data_dir,
    parse_address,
    parse_size,
)
from loraplex.errors import LoraplexError

EPILOG = """\
examples:
  loraplex demo                                    see it work, from nothing
  loraplex serve                                   serve the built-in model on 127.0.0.1:50051
  loraplex adapters upload acme ./acme-lora        give the running server a PEFT adapter
  loraplex generate "Dear customer," --adapter acme
"""

SERVE_EPILOG = """\
One line on stdout says that the server is ready, and where; all logs go to stderr.
Ctrl-C or SIGTERM: requests that run may finish, then the server ends. A second one ends it at once.

examples:
  loraplex serve --model ~/models/Llama-3.2-1B --memory 4G
  loraplex serve --listen 127.0.0.1:0 --metrics off --dtype float32
"""

CHECK_EPILOG = """\
Exit code 0 when everything passed, else 1 and a line on stderr that names what failed; serve would
leave that to torch. Times are of the device alone, with cold caches on a GPU and warm ones on a
CPU; "moved" counts each byte that an op must touch once, and "rate" is to be read beside a copy's.

examples:
  loraplex check
  loraplex check --model meta-llama/Llama-3.1-8B --save
  loraplex check --device cpu --json | jq .failed
"""

DEVICES = ("auto", "cpu", "cuda", "triton-interpret")

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit code: 0, 2 for usage, 130 after Ctrl-C, 1 for everything else."""
    args = build_parser().parse_args(argv)
    func: client.Command = args.func
    return client.run(func, args, expected=(LoraplexError,))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loraplex",
        description="One 4-bit base model, many LoRA adapters, one forward pass.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loraplex {version('loraplex')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_demo(commands)
    _add_check(commands)
    client.add_commands(commands)
    return parser


def _add_serve(commands: client.Subparsers) -> None:
    parser = commands.add_parser(
        "serve",
        help="run the server",
        description="Load a base model and serve it, with adapters uploaded while it runs.",
        epilog=SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_options(parser)
    _add_address_options(parser)
    _add_limit_options(parser)
    parser.set_defaults(func=_serve)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH|HUB_ID|NAME",
        help="a Hugging Face folder, a hub id, or the built-in %(default)s (default)",
    )
    group.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help="default: cuda where there is one, else cpu; triton-interpret runs the GPU's kernels "
        "in Python, for tests with tiny models",
    )
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of activations, KV and adapters (default: bfloat16, which is all that cuda has; cpu "
        "has float32 too; triton-interpret has all three, float16 by default)",
    )
    group.add_argument(
        "--context-length", type=_positive, metavar="N", help="default: what the model allows"
    )
    group.add_argument(
        "--store",
        type=Path,
        default=data_dir() / "store",
        metavar="DIR",
        help="where uploaded adapters are kept (default: %(default)s)",
    )


def _add_address_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("addresses")
    group.add_argument(
        "--listen",
        type=_parsed(parse_address),
        default=Address("127.0.0.1", 50051),
        metavar="HOST:PORT",
        help="gRPC; port 0 takes a free one (default: %(default)s)",
    )
    group.add_argument(
        "--metrics",
        type=_metrics_address,
        default=Address("127.0.0.1", 9464),
        metavar="HOST:PORT|off",
        help="Prometheus over HTTP (default: %(default)s)",
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM chain, to serve TLS")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM private key")
    group.add_argument(
        "--insecure", action="store_true", help="allow --listen beyond this machine without TLS"
    )


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    defaults = ServeConfig(store=Path(), cache=Path())

    def number(flag: str, what: str) -> None:
        default = getattr(defaults, flag.removeprefix("--").replace("-", "_"))
        group.add_argument(
            flag, type=_positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )

    group.add_argument(
        "--memory",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="for KV and adapters together, as 512M or 4G (default: most of a GPU's free memory; "
        "on a CPU a quarter of the free memory, at most 2G)",
    )
    group.add_argument(
        "--host-memory",
        type=_parsed(parse_size),
        metavar="SIZE",
        help="for adapters that are not in use, so that they come back without the disk; 0 keeps "
        "none (default: a quarter of what --memory leaves free)",
    )
    number("--max-rank", "largest adapter rank")
    number("--max-slots", "adapters in device memory at one time")
    number("--max-running", "requests decoded together")
    number("--max-waiting", "requests queued beyond those; one adapter's never take all of it")
    number("--max-step-tokens", "tokens in one forward pass")
    group.add_argument(
        "--prefill-share",
        type=_share,
        default=defaults.prefill_share,
        metavar="PART",
        help="where streams wait for a pass, prompts may lengthen it by such a part of its time: "
        "less is smoother for streams, more is quicker for prompts (default: %(default)s)",
    )
    group.add_argument(
        "--max-adapter-size",
        type=_parsed(parse_size),
        default=defaults.max_adapter_bytes,
        metavar="SIZE",
        help="largest adapter upload (default: 1G)",
    )
    group.add_argument("--threads", type=_positive, metavar="N", help="default: one a core")
    group.add_argument(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the KV of finished requests in memory that nobody needs, for requests of the "
        "same tenant and adapter that begin with the same tokens (default: yes)",
    )
    group.add_argument(
        "--speculation",
        default="auto",
        choices=("auto", "off"),
        help="auto (default): guess a request's next tokens from its own text and verify them in "
        "one pass, as far as it pays; the tokens stay the same. Off where CUDA graphs are used",
    )
    number("--max-draft-tokens", "tokens guessed at a time for one request")
    group.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="on a GPU: launch every kernel of every step anew, which takes longer",
    )
    group.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="grace at shutdown (default: 30)",
    )
    group.add_argument(
        "--step-log", type=Path, metavar="FILE", help="write one JSON line a forward pass"
    )
    group.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning"), help="on stderr"
    )


def _add_demo(commands: client.Subparsers) -> None:
    parser = commands.add_parser(
        "demo",
        help="start a server, upload example adapters, ask all of them at once",
        description="Start a server of its own, upload the example adapters over gRPC, send one "
        "prompt to the base and to every adapter at the same time, and show what shared a pass.",
    )
    parser.add_argument("prompt", nargs="?", default="Tell me about the sea.")
    parser.add_argument("--max-tokens", type=_positive, default=48, metavar="N")
    parser.set_defaults(func=_demo)


def _add_check(commands: client.Subparsers) -> None:
    parser = commands.add_parser(
        "check",
        help="try every kernel on this device: right results, time, bytes/s",
        description="Run every op over a model's shapes on this device, hold its results against "
        "plain\nfp32 maths, and time it. Of the model, config.json alone is read.",
        epilog=CHECK_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help="default: cuda where there is one, else cpu, where the torch ops, the compiled ones "
        "and, in Triton's interpreter, the GPU's kernels are tried",
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="PATH|HUB_ID|NAME",
        help="whose shapes to use (default: %(default)s, the built-in one)",
    )
    parser.add_argument(
        "--max-rank", type=_positive, default=64, metavar="N", help="as serve has it (default: 64)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: one a core")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--save",
        action="store_true",
        help="on a GPU: keep the verdict for serve, and measure which way each 4-bit product is "
        "quickest, which serve then takes (default: serve checks by itself, and all of them go "
        "through bitsandbytes)",
    )
    parser.set_defaults(func=_check)


def _serve(args: argparse.Namespace) -> int:
    _prepare_environment(args.device)
    from loraplex.logs import set_up_logging

    set_up_logging(args.log_level)
    with _server_extra():
        from loraplex.serve import serve
    return serve(_serve_config(args))


def _prepare_environment(device: str) -> None:
    """What torch and triton read when they are imported."""
    # OpenMP's idle threads would spin on the cores that the RPC loop needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if device == "triton-interpret":
        os.environ["TRITON_INTERPRET"] = "1"


def _serve_config(args: argparse.Namespace) -> ServeConfig:
    if args.max_step_tokens < args.max_running:
        raise UsageError("--max-step-tokens must be at least --max-running")
    return ServeConfig(
        store=args.store,
        cache=cache_dir(),
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        listen=args.listen,
        metrics=args.metrics,
        insecure=args.insecure,
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        max_rank=args.max_rank,
        max_slots=args.max_slots,
        memory=args.memory,
        host_memory=args.host_memory,
        max_running=args.max_running,
        max_waiting=args.max_waiting,
        max_step_tokens=args.max_step_tokens,
        prefill_share=args.prefill_share,
        max_adapter_bytes=args.max_adapter_size,
        context_length=args.context_length,
        threads=args.threads,
        cuda_graphs=not args.no_cuda_graphs,
        prefix_cache=args.prefix_cache,
        speculation=args.speculation == "auto",
        max_draft_tokens=args.max_draft_tokens,
        step_log=args.step_log,
        drain_seconds=args.drain,
    )


def _demo(args: argparse.Namespace) -> int:
    with _server_extra():
        import loraplex.serve  # noqa: F401
    from loraplex.demo import demo

    return demo(args.prompt, args.max_tokens)


def _check(args: argparse.Namespace) -> int:
    _prepare_environment("cpu")  # the interpreter runs in a process of its own
    with _server_extra():
        from loraplex.check import CheckConfig, check
    return check(
        CheckConfig(
            cache=cache_dir(),
            model=args.model,
            device=args.device,
            max_rank=args.max_rank,
            threads=args.threads,
            as_json=args.json,
            is_saved=args.save,
        )
    )


@contextmanager
def _server_extra() -> Iterator[None]:
    """One line instead of a traceback where the server's packages are not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise LoraplexError(
            f"this command runs a server, which needs {error.name}: pip install '.[server]' in the"
            " clone of Loraplex"
        ) from error


def _parsed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For argparse: a parser's own words become the usage error."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _metrics_address(text: str) -> Address | None:
    return None if text == "off" else _parsed(parse_address)(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 100")
    return share


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
