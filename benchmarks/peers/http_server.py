"""A peer that is a server of its own, asked over HTTP."""

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from child import SECONDS_TO_END, BenchmarkError, environment
from peers.streams import Got, post_events, together
from waves import Reply, Wave

SECONDS_TO_START = 600.0

Body = Callable[[tuple[int, ...], str | None, int], Mapping[str, Any]]
"""The request for a prompt, an adapter and a number of tokens."""

Tokens = Callable[[Any, int], Sequence[int]]
"""The token ids of one event, given how many came before."""


def free_port() -> int:
    """One that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class HttpServer:
    """The process with all that it starts, and a client for it, which asks over `path`.

    It has a session of its own, so that Ctrl-C reaches the benchmark alone, which then ends it.
    """

    def __init__(
        self,
        port: int,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        *,
        path: str,
        body: Body,
        tokens: Tokens,
    ) -> None:
        self._port = port
        self._path, self._body, self._tokens = path, body, tokens
        self._log = log
        self._runner = asyncio.Runner()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment(), **variables},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Until `/health` says so; BenchmarkError, with its last words, if it ends instead."""
        end = time.monotonic() + SECONDS_TO_START
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise BenchmarkError(f"it ended too early: {self._last_words()}")
            if time.monotonic() > end:
                raise BenchmarkError(f"it is not ready after {SECONDS_TO_START:.0f} s")
            time.sleep(0.25)

    def run(self, wave: Wave) -> list[Reply]:
        async def request(index: int, got: Got) -> None:
            asked = self._body(wave.prompts[index], wave.adapters[index], wave.max_tokens)
            num_tokens = 0
            async for event in post_events(self._port, self._path, asked):
                new = tuple(self._tokens(event, num_tokens))
                num_tokens += len(new)
                got(new)

        return self._runner.run(together(wave, request))

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as got:
                return bool(got.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self) -> str:
        said = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        errors = [line for line in said if "error" in line.lower()]
        return (errors or said)[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._runner.close()
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=SECONDS_TO_END)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
