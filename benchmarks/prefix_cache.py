"""How soon does the first token come when the beginning of a prompt was computed before?

python benchmarks/prefix_cache.py --help
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from adapter_files import linears_of, write_adapter
from child import BenchmarkError
from command import Check, Findings, build_parser, number, progress, run_command, table
from lifecycle import ServerSettings, make_resident, model_folder, running_server, upload_all
from loraplex.adapters.peft import CONFIG_NAME
from loraplex_client import AsyncClient, Delta, Finished

DESCRIPTION = """\
Requests come in pairs, one after the other: both begin with the same tokens, which nobody has sent
before, and end with different ones. Compared are their times to first token, medians over all
pairs: for the bare base, for an adapter, and for an activated one (aLoRA), which finds what was
computed for the base. Then conversations, whose every turn goes on from the one before.
"""

EPILOG = """\
examples:
  python benchmarks/prefix_cache.py --save prefix_cache
  python benchmarks/prefix_cache.py --repeats 3 --conversations 1      # a quick look
"""

LIMIT = 0.15
"""TTFT of the second request of a pair over that of the first."""

PLAIN, ACTIVATED = "plain", "activated"
INVOCATION = (17, 23, 42, 17, 42, 23)
"""Tokens that invoke the activated adapter; random prompts do not hold them."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request."""

    num_prompt: int
    num_cached: int
    first_token: float  # seconds from sending
    token_ids: Tokens


@dataclass(slots=True)
class Pairs:
    """First and second requests, parallel. Grow."""

    first: list[Answer] = field(default_factory=list)
    second: list[Answer] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return _ttft(self.second) / _ttft(self.first)


@dataclass(slots=True)
class Turn:
    """The same turn of all conversations, and prompts of that length of which nothing is there."""

    cached: list[Answer] = field(default_factory=list)
    anew: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """By name, and by turn."""

    pairs: Mapping[str, Pairs]
    turns: Sequence[Turn]


def main(argv: Sequence[str]) -> int:
    return run_command(_parser(), _benchmark, argv)


def _parser() -> argparse.ArgumentParser:
    parser = build_parser("prefix_cache.py", DESCRIPTION, EPILOG)
    group = parser.add_argument_group("what is asked")
    number(group, "--repeats", 20, "pairs of each kind")
    number(group, "--prefix-tokens", 1000, "that a pair shares")
    number(group, "--suffix-tokens", 16, "of each request's own")
    number(group, "--rank", 16, "of the adapters, on all seven linears")
    number(group, "--conversations", 5, "each for the adapter, one after the other")
    number(group, "--turns", 8, "of each")
    number(group, "--turn-tokens", 64, "in each turn, and as many out")
    return parser


def _benchmark(args: argparse.Namespace) -> Findings:
    model = model_folder(args.model)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as name:
        work = Path(name)
        adapters = {kind: work / kind for kind in (PLAIN, ACTIVATED)}
        for seed, folder in enumerate(adapters.values()):
            write_adapter(folder, linears_of(model), args.rank, args.seed * 1000 + seed)
        _activate(adapters[ACTIVATED])
        progress("starting a server, uploading")
        settings = ServerSettings(str(model), args.dtype, args.threads)
        with running_server(settings, work / "store", work / "server.log") as server:
            upload_all(server.target, adapters)
            measured = asyncio.run(_measure(server.target, args))
    return _findings(measured, args)


def _activate(folder: Path) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["alora_invocation_tokens"] = INVOCATION
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


async def _measure(target: str, args: argparse.Namespace) -> Measured:
    async with AsyncClient(target) as client:
        await make_resident(client, (PLAIN, ACTIVATED))
        asker = Asker(client, (await client.server_info()).vocab_size, args.seed)
        pairs = {"base": Pairs(), "adapter": Pairs(), "activated adapter after base": Pairs()}
        for repeat in range(args.repeats):
            progress(f"pair {repeat + 1} of {args.repeats}")
            for name, each in pairs.items():
                await _pair(asker, name, each, args)
        turns = [Turn() for _ in range(args.turns)]
        for conversation in range(args.conversations):
            progress(f"conversation {conversation + 1} of {args.conversations}")
            await _converse(asker, turns, args.turn_tokens)
    return Measured(pairs, turns)


class Asker:
    """Greedy requests, one at a time, with random tokens of its own. Mutable: `_rng`."""

    def __init__(self, client: AsyncClient, vocab_size: int, seed: int) -> None:
        self._client = client
        self._vocab_size = vocab_size
        self._rng = random.Random(f"prefixes {seed}")

    def tokens(self, count: int) -> Tokens:
        return tuple(self._rng.randrange(self._vocab_size) for _ in range(count))

    async def ask(self, prompt: Tokens, adapter: str, max_tokens: int = 1) -> Answer:
        sent, first, token_ids = time.monotonic(), 0.0, list[int]()
        async for event in self._client.stream(
            token_ids=prompt,
            adapter_id=adapter,
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=0.0,
            repetition_penalty=1.0,
        ):
            if isinstance(event, Delta) and event.token_ids:
                first = first or time.monotonic() - sent
                token_ids += event.token_ids
            elif isinstance(event, Finished):
                cached = event.usage.cached_tokens
                return Answer(len(prompt), cached, first, tuple(token_ids))
        raise BenchmarkError("a stream ended without its end")


async def _pair(asker: Asker, kind: str, pairs: Pairs, args: argparse.Namespace) -> None:
    """The activated adapter's prefixes are computed anew for its first, by the base for its second.

    What follows its prefix, the invocation included, is as long as the others' suffix.
    """
    adapter = {"base": "", "adapter": PLAIN}.get(kind, ACTIVATED)
    end = INVOCATION if adapter == ACTIVATED else ()
    prefix = asker.tokens(args.prefix_tokens)

    def prompt() -> Tokens:
        return prefix + asker.tokens(max(0, args.suffix_tokens - len(end))) + end

    pairs.first.append(await asker.ask(prompt(), adapter))
    if adapter == ACTIVATED:
        prefix = asker.tokens(args.prefix_tokens)
        await asker.ask(prefix + asker.tokens(args.suffix_tokens), "")
    pairs.second.append(await asker.ask(prompt(), adapter))
    if pairs.first[-1].num_cached or not pairs.second[-1].num_cached:
        raise BenchmarkError(f"{kind}: the first of a pair found something, or the second nothing")


async def _converse(asker: Asker, turns: Sequence[Turn], num_tokens: int) -> None:
    history: Tokens = ()
    for turn in turns:
        history += asker.tokens(num_tokens)
        answer = await asker.ask(history, PLAIN, num_tokens)
        turn.cached.append(answer)
        turn.anew.append(await asker.ask(asker.tokens(len(history)), PLAIN))
        history += answer.token_ids


def _ttft(answers: Sequence[Answer]) -> float:
    return median(answer.first_token for answer in answers)


def _findings(measured: Measured, args: argparse.Namespace) -> Findings:
    pairs = [
        [
            name,
            f"{each.second[-1].num_prompt}",
            f"{each.second[-1].num_cached}",
            _milliseconds(each.first),
            _milliseconds(each.second),
            f"{each.ratio:.3f}",
        ]
        for name, each in measured.pairs.items()
    ]
    turns = [
        [
            f"{index}",
            f"{turn.cached[-1].num_prompt}",
            f"{turn.cached[-1].num_cached}",
            _milliseconds(turn.anew),
            _milliseconds(turn.cached),
            f"{_ttft(turn.cached) / _ttft(turn.anew):.3f}",
        ]
        for index, turn in enumerate(measured.turns, 1)
    ]
    header = ["", "prompt tokens", "cached", "TTFT ms, first", "second", "ratio"]
    text = (
        f"{table(header, pairs)}\n\n"
        f"{table(['turn', *header[1:3], 'TTFT ms, nothing cached', 'as a turn', 'ratio'], turns)}"
        f"\n\nMedians of {args.repeats} pairs and of {args.conversations} conversations."
    )
    figures = {
        "pairs": {
            name: {"first_s": _seconds(each.first), "second_s": _seconds(each.second)}
            for name, each in measured.pairs.items()
        },
        "turns": [
            {
                "prompt_tokens": turn.cached[-1].num_prompt,
                "cached_tokens": turn.cached[-1].num_cached,
                "anew_s": _seconds(turn.anew),
                "cached_s": _seconds(turn.cached),
            }
            for turn in measured.turns
        ],
    }
    shared = f"TTFT, {args.prefix_tokens} of {pairs[0][1]} tokens shared, second over first"
    checks = [
        Check(f"{name}: {shared}", each.ratio, LIMIT) for name, each in measured.pairs.items()
    ]
    return Findings(text, figures, checks)


def _milliseconds(answers: Sequence[Answer]) -> str:
    return f"{_ttft(answers) * 1e3:.0f}"


def _seconds(answers: Sequence[Answer]) -> list[float]:
    return [round(answer.first_token, 5) for answer in answers]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
