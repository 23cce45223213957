"""A load on a server over gRPC: how much, how fast, how fair.

python benchmarks/serving.py --help
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from serving_options import build_parser, check


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, 1 where no request was answered, 2 usage, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    return _run(args, shlex.join(["python", "benchmarks/serving.py", *argv]))


def _run(args: argparse.Namespace, command: str) -> int:
    # What follows imports gRPC, which --help need not wait for.
    from child import BenchmarkError
    from command import ending_children
    from loraplex.errors import LoraplexError as ServerSideError
    from loraplex_client import LoraplexError
    from serving_session import measure
    from trace_file import TraceError

    try:
        with ending_children():
            return measure(args, command)
    except KeyboardInterrupt:
        return 130
    except (BenchmarkError, LoraplexError, ServerSideError, TraceError, OSError) as error:
        sys.stderr.write(f"serving.py: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
