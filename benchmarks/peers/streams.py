"""Requests of a wave as streams that run together, and server-sent events over HTTP sockets.

The client is of the few lines that these servers need, so that it takes little of the cores that
they run on.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from child import BenchmarkError
from figures import Arrival
from waves import Reply, Wave

Got = Callable[[tuple[int, ...]], None]
"""Is told of tokens at the moment they arrive."""

Request = Callable[[int, Got], Coroutine[Any, Any, None]]
"""Sends the wave's request of that index."""


async def together(wave: Wave, request: Request) -> list[Reply]:
    """All requests at once, for as long as the wave allows; the rest of them is then given up."""
    start = time.perf_counter()
    arrivals: list[list[Arrival]] = [[] for _ in wave.prompts]
    tokens: list[list[int]] = [[] for _ in wave.prompts]

    def got(index: int) -> Got:
        def take(new: tuple[int, ...]) -> None:
            if new:
                arrivals[index].append(Arrival(time.perf_counter() - start, len(new)))
                tokens[index] += new

        return take

    tasks = [asyncio.create_task(request(i, got(i))) for i in range(len(wave.prompts))]
    try:
        async with asyncio.timeout(wave.seconds):
            await asyncio.gather(*tasks)
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [Reply(tuple(a), tuple(t)) for a, t in zip(arrivals, tokens, strict=True)]


async def post_events(port: int, path: str, body: object) -> AsyncIterator[Any]:
    """The JSON of each `data:` event that a server on this machine answers with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body))
        status = (await reader.readline()).split()
        headers = [line async for line in _header_lines(reader)]
        if status[1:2] != [b"200"]:
            said = (await reader.read(500)).decode(errors="replace")
            raise BenchmarkError(f"{path} was answered {b' '.join(status[1:]).decode()}: {said}")
        chunked = b"transfer-encoding: chunked" in headers
        events = Events()
        async for data in _chunks(reader) if chunked else _pieces(reader):
            for event in events.feed(data):
                yield event
    finally:
        writer.close()


def request_bytes(path: str, body: object) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


class Events:
    """Bytes in, whole events out. Mutable: what is left of an event that has not ended."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Any]:
        """The JSON of the events that `data` completes; the end mark is none."""
        *whole, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in whole:
            content = event.removeprefix(b"data:").strip()
            if event.startswith(b"data:") and content != b"[DONE]":
                yield json.loads(content)


async def _header_lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := (await reader.readline()).strip():
        yield line.lower()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 16):
        yield data
