"""Do drafts from a request's own text pay, and does it stay the same text?

python benchmarks/speculative.py --help
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from adapter_files import linears_of, write_adapter
from child import BENCHMARKS
from command import Check, Findings, build_parser, number, progress, run_command, table
from lifecycle import (
    Counters,
    Server,
    ServerSettings,
    make_resident,
    model_folder,
    running_server,
    upload_all,
)
from loraplex_client import AsyncClient, Completion

DESCRIPTION = """\
Two servers, one with --speculation auto and one with it off, answer the same chat prompts greedily
with one adapter of rank 16 on all modules, in turns. The prompts (benchmarks/prompts/) are of two
kinds: some ask for quotes, edits or extracts of a text that they hold; the others are open. At
batch 1 counted are the tokens a second between a request's first and last, by the server's clock;
at larger batches all tokens over the time to the last answer. Where the tokens of the two servers
first differ, the two most likely ones may lie close together in bfloat16; in float32 nothing may
differ.
"""

EPILOG = """\
examples:
  python benchmarks/speculative.py --save speculative
  python benchmarks/speculative.py --dtype float32 --batches 1 --repeats 1
"""

PROMPTS = BENCHMARKS / "prompts" / "speculative.jsonl"
ADAPTER = "r16"
OPEN = "open"

LIMIT = 1.3
"""Tokens/s with drafts over without, where text repeats, at batch 1."""

NO_LOSS = 0.97
"""Everywhere else."""

CLEAR_GAP = 0.25
"""Of two logits: from here on bfloat16 has to choose the larger one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the file."""

    name: str
    kind: str
    prompt: str

    @property
    def repeats(self) -> bool:
        """Whether its answer is likely to repeat parts of it."""
        return self.kind != OPEN


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers, and who asks it."""

    server: Server
    client: AsyncClient

    async def ask(self, prompt: Prompt, max_tokens: int, logprobs: int | None = None) -> Completion:
        return await self.client.complete(
            messages=[{"role": "user", "content": prompt.prompt}],
            adapter_id=ADAPTER,
            temperature=0.0,
            max_tokens=max_tokens,
            logprobs=logprobs,
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """All prompts of one kind, asked of one server: tokens, seconds, what the engine counted."""

    num_tokens: int
    seconds: float
    num_steps: float
    num_drafts: float
    num_accepted: float

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


def main(argv: Sequence[str]) -> int:
    parser = build_parser("speculative.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--max-tokens", 128, "tokens of an answer")
    number(group, "--repeats", 3, "passes over the prompts for each server")
    group.add_argument(
        "--batches", default="1,8,32", metavar="N,...", help="requests at one time (%(default)s)"
    )
    return run_command(parser, _benchmark, argv)


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    prompts = read_prompts(PROMPTS)
    batches = [int(batch) for batch in args.batches.split(",")]
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name, ExitStack() as stack:
        work = Path(name)
        write_adapter(work / ADAPTER, linears_of(model), 16, seed=args.seed)
        servers = {}
        for speculation in ("off", "auto"):
            progress(f"starting a server, --speculation {speculation}")
            settings = ServerSettings(
                str(model), args.dtype, args.threads, memory=1 << 29, speculation=speculation
            )
            store, log = work / f"store-{speculation}", work / f"{speculation}.log"
            servers[speculation] = stack.enter_context(running_server(settings, store, log))
            upload_all(servers[speculation].target, {ADAPTER: work / ADAPTER})
        return asyncio.run(_measure(args, servers, prompts, batches))


def read_prompts(path: Path) -> list[Prompt]:
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


async def _measure(
    args: argparse.Namespace,
    servers: Mapping[str, Server],
    prompts: Sequence[Prompt],
    batches: Sequence[int],
) -> Findings:
    async with (
        AsyncClient(servers["off"].target) as off,
        AsyncClient(servers["auto"].target) as auto,
    ):
        sides = {"off": Side(servers["off"], off), "auto": Side(servers["auto"], auto)}
        for side in sides.values():
            await make_resident(side.client, [ADAPTER])
        progress("the same tokens?")
        differences = [
            difference
            for prompt in prompts
            if (difference := await _difference(sides, prompt, args.max_tokens)) is not None
        ]
        passes: dict[tuple[int, bool, str], list[Pass]] = {}
        for turn in range(args.repeats):
            progress(f"pass {turn + 1} of {args.repeats}")
            for batch in batches:
                for repeats in (True, False):
                    chosen = [prompt for prompt in prompts if prompt.repeats == repeats]
                    for name in ("off", "auto") if turn % 2 == 0 else ("auto", "off"):
                        taken = await _pass(sides[name], chosen, batch, args.max_tokens)
                        passes.setdefault((batch, repeats, name), []).append(taken)
    return _findings(args.dtype, len(prompts), differences, passes)


async def _difference(
    sides: Mapping[str, Side], prompt: Prompt, max_tokens: int
) -> tuple[str, int, float] | None:
    """Where the two servers' answers part, and the gap of the plain one's best two logits there."""
    plain = await sides["off"].ask(prompt, max_tokens, logprobs=2)
    drafted = await sides["auto"].ask(prompt, max_tokens)
    at = first_difference(plain.token_ids, drafted.token_ids)
    if at is None:
        return None
    best, second = (top.logprob for top in plain.logprobs[at].top)
    return prompt.name, at, best - second


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    if left == right:
        return None
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


async def _pass(side: Side, prompts: Sequence[Prompt], batch: int, max_tokens: int) -> Pass:
    before, started = side.server.counters(), time.perf_counter()
    if batch == 1:
        answers = [await side.ask(prompt, max_tokens) for prompt in prompts]
        seconds = sum(answer.timings.decode for answer in answers)
        num_tokens = sum(len(answer.token_ids) - 1 for answer in answers)
    else:
        together = [prompts[index % len(prompts)] for index in range(batch)]
        answers = await asyncio.gather(*(side.ask(prompt, max_tokens) for prompt in together))
        seconds = time.perf_counter() - started
        num_tokens = sum(len(answer.token_ids) for answer in answers)
    return _counted(side.server.counters(), before, num_tokens, seconds)


def _counted(now: Counters, before: Counters, num_tokens: int, seconds: float) -> Pass:
    return Pass(
        num_tokens,
        seconds,
        now.since(before, "engine_step_seconds_count"),
        now.since(before, "spec_decode_num_draft_tokens_total"),
        now.since(before, "spec_decode_num_accepted_tokens_total"),
    )


def _findings(
    dtype: str,
    num_prompts: int,
    differences: Sequence[tuple[str, int, float]],
    passes: Mapping[tuple[int, bool, str], Sequence[Pass]],
) -> Findings:
    rows, checks, ratios = [], [], {}
    for batch, repeats in dict.fromkeys((batch, repeats) for batch, repeats, _ in passes):
        off, auto = (passes[batch, repeats, name] for name in ("off", "auto"))
        ratio = median(a.rate / o.rate for o, a in zip(off, auto, strict=True))
        kind = "quotes, edits, extracts" if repeats else "open"
        rows.append([f"batch {batch}, {kind}", *_row(off, auto), f"{ratio:.2f}"])
        ratios[f"{batch} {kind}"] = ratio
        limit = LIMIT if batch == 1 and repeats else NO_LOSS
        checks.append(
            Check(f"drafts over none, batch {batch}, {kind}", ratio, limit, at_most=False)
        )
    wrong = [d for d in differences if dtype == "float32" or d[2] >= CLEAR_GAP]
    checks.append(Check("answers with another token where it is clear", len(wrong), 0))
    header = ["", "tokens/s off", "tokens/s auto", "drafts a step", "accepted a step", "ratio"]
    said = "; ".join(f"{name} at token {at}, gap {gap:.3f}" for name, at, gap in differences)
    text = (
        f"{table(header, rows)}\n\nAnswers that differ at all: {len(differences)} of {num_prompts}"
        f"{': ' + said if said else ''}."
    )
    return Findings(text, {"ratios": ratios, "differences": list(differences)}, checks)


def _row(off: Sequence[Pass], auto: Sequence[Pass]) -> list[str]:
    steps = sum(each.num_steps for each in auto)
    return [
        f"{median(each.rate for each in off):.1f}",
        f"{median(each.rate for each in auto):.1f}",
        f"{sum(each.num_drafts for each in auto) / steps:.2f}",
        f"{sum(each.num_accepted for each in auto) / steps:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
