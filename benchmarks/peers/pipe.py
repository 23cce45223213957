"""A peer in a process of its own: one line of JSON to load it, then one a wave.

    -> {"model": FOLDER, "adapters": {NAME: FOLDER}, "dtype": "bfloat16", "threads": 2}
    <- {}
    -> {"prompts": [[TOKEN, ...], ...], "adapters": [NAME | null, ...], "max_tokens": 64}
    <- {"timelines": [[[SECONDS, NUM_TOKENS], ...], ...]}

Between a reply and the next wave a peer does nothing. The end of its input ends it.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from child import Child
from figures import Arrival, Timeline
from workload import Wave

PEERS = {"peft": "peers.peft_mixed"}
"""The module behind each name that `--peers` takes."""


class Peer(Protocol):
    """Whatever can run a wave: Loraplex's client here, another system's process there."""

    def run(self, wave: Wave) -> list[Timeline]: ...


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """The same model, adapters and threads as Loraplex has."""

    model: str  # a full-precision Hugging Face folder; its linears are to be rounded to NF4
    adapters: Mapping[str, str]  # PEFT folders by name
    dtype: str  # of activations and of the dequantised weights
    threads: int


class PipedPeer:
    """The benchmark's end of the pipe."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def load(self, settings: PeerSettings) -> None:
        self._child.write(json.dumps(asdict(settings)))
        self._child.read()

    def run(self, wave: Wave) -> list[Timeline]:
        self._child.write(json.dumps(asdict(wave)))
        reply = json.loads(self._child.read())
        return [tuple(Arrival(*pair) for pair in timeline) for timeline in reply["timelines"]]


def serve_pipe(load: Callable[[PeerSettings], Peer]) -> None:
    """The peer's end. What libraries print goes to stderr, so that stdout holds replies alone."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        peer = load(PeerSettings(**json.loads(sys.stdin.readline())))
        replies.write("{}\n")
        for line in sys.stdin:
            timelines = peer.run(_wave(json.loads(line)))
            replies.write(json.dumps({"timelines": timelines}) + "\n")


def _wave(fields: Mapping[str, object]) -> Wave:
    prompts, adapters, max_tokens = fields["prompts"], fields["adapters"], fields["max_tokens"]
    assert isinstance(prompts, list)
    assert isinstance(adapters, list)
    assert isinstance(max_tokens, int)
    return Wave(tuple(map(tuple, prompts)), tuple(adapters), max_tokens)
