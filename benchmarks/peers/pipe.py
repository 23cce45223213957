"""A peer without a server of its own, in a process of its own: a line of JSON a wave.

    -> {"model": FOLDER, "adapters": {NAME: FOLDER}, "rank": 16, "threads": 2, ...}
    <- {}
    -> {"prompts": [[TOKEN, ...], ...], "adapters": [NAME | null, ...], "max_tokens": 64, ...}
    <- {"replies": [[[[SECONDS, NUM_TOKENS], ...], [TOKEN, ...]], ...]}

Between a reply and the next wave a peer does nothing. The end of its input ends it. This module is
imported on both ends: of what is not Python's own it needs nothing.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from child import Child
from figures import Arrival
from waves import Reply, Wave


class Runner(Protocol):
    """Whatever can run a wave."""

    def run(self, wave: Wave) -> list[Reply]: ...


class Peer(Runner, Protocol):
    """One of those that take turns: Loraplex's client, an HTTP server's, or a piped process."""

    @property
    def pid(self) -> int | None:
        """Of the process whose memory, with its children's, is the system's. None: not ours."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """The same model, adapters and threads as Loraplex has."""

    model: str  # a full-precision Hugging Face folder
    adapters: Mapping[str, str]  # PEFT folders by name
    rank: int  # of all of them
    threads: int
    max_batch: int  # requests of the largest wave
    max_context: int  # tokens of the longest request, prompt and answer
    precision: str  # of the base's weights: "bf16", "nf4", "q4_1"


class PipedPeer:
    """The benchmark's end of the pipe."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def begin_loading(self, settings: PeerSettings) -> None:
        self._child.write(json.dumps(asdict(settings)))

    def wait_until_ready(self) -> None:
        self._child.read()

    def run(self, wave: Wave) -> list[Reply]:
        self._child.write(json.dumps(asdict(wave)))
        return [_reply(*fields) for fields in json.loads(self._child.read())["replies"]]


def serve_pipe(load: Callable[[PeerSettings], Runner]) -> None:
    """The peer's end. What libraries print goes to stderr, so that stdout holds replies alone."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        peer = load(PeerSettings(**json.loads(sys.stdin.readline())))
        replies.write("{}\n")
        for line in sys.stdin:
            replies.write(json.dumps({"replies": peer.run(_wave(json.loads(line)))}) + "\n")


def _wave(fields: Mapping[str, Any]) -> Wave:
    return Wave(
        tuple(map(tuple, fields["prompts"])),
        tuple(fields["adapters"]),
        fields["max_tokens"],
        fields["seconds"],
    )


def _reply(timeline: Sequence[tuple[float, int]], tokens: Sequence[int]) -> Reply:
    return Reply(tuple(Arrival(*pair) for pair in timeline), tuple(tokens))
