"""`loraplex demo`: a server of its own, the example adapters, one prompt to all of them at once."""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex_client import AsyncClient, Delta
from loraplex_client.examples import ExampleAdapter, example_adapters
from loraplex_client.side_by_side import show_side_by_side
from rich.console import Console

from loraplex.errors import StartupError

BASE_NAME = "base model"


def demo(prompt: str, max_tokens: int) -> int:
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its server ends as well
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as folder:
        steps = Path(folder) / "steps.jsonl"
        console.print(
            "Starting a server (only the first time, its model is fetched: about 90 MB) ..."
        )
        with _server(Path(folder) / "store", steps) as target:
            console.print(f"It listens on {target}. The same prompt goes to everyone, at once:")
            console.print(f"  [bold]{prompt}[/bold]\n", highlight=False)
            asyncio.run(_ask_everyone(target, prompt, max_tokens, console))
        console.print(Summary.of(_read_steps(steps)).text(), highlight=False, soft_wrap=True)
        console.print("That server has ended. Start one of your own with: loraplex serve")
    return 0


@contextmanager
def _server(store: Path, steps: Path) -> Iterator[str]:
    """A `loraplex serve` in a process of its own; yields its address once it is ready."""
    command = [sys.executable, "-m", "loraplex.cli", "serve", "--listen", "127.0.0.1:0"]
    command += ["--metrics", "off", "--store", str(store), "--step-log", str(steps)]
    command += ["--memory", "512M", "--log-level", "warning"]
    log = store.with_name("server.log")
    on_terminal = sys.stderr.isatty()  # then its progress bars may show
    with log.open("w") as log_file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=None if on_terminal else log_file,
            text=True,
        )
        try:
            yield _address(process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _address(process: "subprocess.Popen[str]", log: Path) -> str:
    """From the one line that a ready server writes."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        said = log.read_text().strip().splitlines() or ["it said nothing"]
        raise StartupError(f"the demo's server did not start: {said[-1]}")
    return line.split(" on ", 1)[1].split(" ", 1)[0]


async def _ask_everyone(target: str, prompt: str, max_tokens: int, console: Console) -> None:
    async with AsyncClient(target) as client:
        examples = example_adapters()
        for example in examples:
            started = time.perf_counter()
            await client.upload_adapter(example.name, example.path)
            milliseconds = (time.perf_counter() - started) * 1000
            console.print(
                f"  uploaded [bold]{example.name}[/bold] in {milliseconds:.0f} ms: "
                f"{example.description}",
                highlight=False,
                soft_wrap=True,
            )
        console.print()
        streams = {BASE_NAME: _text(client, prompt, "", max_tokens)}
        streams |= _adapter_streams(client, prompt, examples, max_tokens)
        await show_side_by_side(streams, console)


def _adapter_streams(
    client: AsyncClient, prompt: str, examples: Sequence[ExampleAdapter], max_tokens: int
) -> dict[str, AsyncIterator[str]]:
    return {e.name: _text(client, prompt, e.name, max_tokens) for e in examples}


async def _text(
    client: AsyncClient, prompt: str, adapter_id: str, max_tokens: int
) -> AsyncIterator[str]:
    messages = [{"role": "user", "content": prompt}]
    async for event in client.stream(
        messages=messages, adapter_id=adapter_id, max_tokens=max_tokens, temperature=0.0
    ):
        if isinstance(event, Delta):
            yield event.text


@dataclass(frozen=True, slots=True)
class Summary:
    """What the step-by-step record shows."""

    num_steps: int
    num_tokens: int
    seconds: float
    most_adapters: int  # distinct adapters in one forward pass
    most_requests: int

    @classmethod
    def of(cls, steps: Iterable[dict[str, object]]) -> "Summary":
        records = list(steps)
        adapters = [{d for d in _list(r["digests"]) if d is not None} for r in records]
        return cls(
            num_steps=len(records),
            num_tokens=sum(int(str(r["num_sampled"])) for r in records),
            seconds=sum(float(str(r["duration"])) for r in records),
            most_adapters=max((len(found) for found in adapters), default=0),
            most_requests=max((len(_list(r["request_ids"])) for r in records), default=0),
        )

    def text(self) -> str:
        speed = self.num_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.num_tokens} tokens in {self.num_steps} forward passes, "
            f"{speed:.0f} tokens/s. One pass served up to {self.most_requests} requests "
            f"with {self.most_adapters} different adapters."
        )


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _read_steps(path: Path) -> Iterator[dict[str, object]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file)
