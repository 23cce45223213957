"""Both clients against a real socket: the same calls, the same answers, the same errors."""

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_client import (
    AsyncClient,
    Client,
    Completion,
    DeadlineExceeded,
    Delta,
    Finished,
    FinishReason,
    LoraplexError,
    NotFound,
    ServerUnreachable,
    Started,
    Timings,
    Usage,
    UsedAdapter,
)
from loraplex_protos.v1 import inference_pb2

if TYPE_CHECKING:
    from tests.clients.conftest import FakeServer

MakeAdapter = Callable[..., Path]
CallClient = Callable[..., Any]


def _sync(target: str, method: str, *args: Any, token: str | None = None, **kwargs: Any) -> Any:
    with Client(target, token) as client:
        result = getattr(client, method)(*args, **kwargs)
        return list(result) if isinstance(result, Iterator) else result


def _async(target: str, method: str, *args: Any, token: str | None = None, **kwargs: Any) -> Any:
    async def call() -> Any:
        async with AsyncClient(target, token) as client:
            result = getattr(client, method)(*args, **kwargs)
            if isinstance(result, AsyncIterator):
                return [item async for item in result]
            return await result

    return asyncio.run(call())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> CallClient:
    """One call on a client of its own; iterators come back as lists."""
    made: CallClient = request.param
    return made


def test_the_two_clients_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(value).parameters.values())
            for name, value in vars(client).items()
            if inspect.isfunction(value) and (not name.startswith("_") or name == "__init__")
        }

    assert methods(Client) == methods(AsyncClient)


def test_stream(server: "FakeServer", call: CallClient) -> None:
    events = call(server.target, "stream", "one two", "pirate", seed=1, request_id="mine")
    assert events[0] == Started("r1", (UsedAdapter("pirate", "v1"),), 7, 0)
    deltas = events[1:-1]
    assert deltas == [Delta("<pirate>", (0,)), Delta("one", (1,)), Delta(" two", (2,))]
    assert events[-1] == Finished(
        FinishReason.LENGTH, None, Usage(7, 0, 3), Timings(0.25, 0.5, 1.0, 0.0)
    )
    request = server.calls[0].request
    assert (request.text, request.sampling.seed, request.request_id) == ("one two", 1, "mine")


def test_complete(server: "FakeServer", call: CallClient) -> None:
    answer = call(server.target, "complete", messages=[{"role": "user", "content": "a b"}])
    assert answer == Completion(
        text="a b",
        token_ids=(0, 1),
        finish_reason=FinishReason.LENGTH,
        usage=Usage(7, 0, 2),
        timings=Timings(0.25, 0.5, 1.0, 0.0),
        request_id="r1",
    )


def test_a_wrong_keyword_fails_before_anything_is_sent(
    server: "FakeServer", call: CallClient
) -> None:
    for method in ("stream", "complete", "tokenize"):
        with pytest.raises(TypeError, match="'nope'"):
            call(server.target, method, "hi", nope=1)
    assert server.calls == []


def test_tokenize_and_server_info(server: "FakeServer", call: CallClient) -> None:
    assert call(server.target, "tokenize", "hi") == (1, 2, 3)
    info = call(server.target, "server_info")
    assert (info.model, info.device, info.features) == ("tiny", "cpu", ("chat",))
    assert info.limits.max_rank == 64


def test_the_life_of_an_adapter(
    server: "FakeServer", call: CallClient, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter()
    seen: list[tuple[int, int]] = []

    def progress(sent: int, total: int) -> None:
        seen.append((sent, total))

    result = call(server.target, "upload_adapter", "pirate", folder, progress=progress)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert server.weights["pirate"] == weights
    assert (result.created, result.warnings) == (True, ("a warning",))
    assert result.adapter.adapter_id == "pirate"
    mib = 1 << 20
    assert seen == [(sent, len(weights)) for sent in (0, mib, 2 * mib, 3 * mib, len(weights))]

    assert not call(server.target, "upload_adapter", "pirate", folder).created
    assert call(server.target, "get_adapter", "pirate") == result.adapter
    assert call(server.target, "pin_adapter", "pirate").pinned
    assert not call(server.target, "pin_adapter", "pirate", pinned=False).pinned
    assert call(server.target, "delete_adapter", "pirate") is None
    with pytest.raises(NotFound, match="no such adapter") as caught:
        call(server.target, "get_adapter", "pirate")
    assert caught.value.reason == "ADAPTER_NOT_FOUND"


@pytest.mark.parametrize("page_size", [0, 1, 3, 5, 100])
def test_lists_go_on_over_pages(
    server: "FakeServer", call: CallClient, make_adapter: MakeAdapter, page_size: int
) -> None:
    folder = make_adapter(10)
    with Client(server.target) as client:
        for name in "edcba":
            client.upload_adapter(name, folder)
    listed = call(server.target, "list_adapters", page_size=page_size)
    assert [adapter.adapter_id for adapter in listed] == list("abcde")


def test_metadata(server: "FakeServer", call: CallClient, make_adapter: MakeAdapter) -> None:
    call(server.target, "upload_adapter", "a", make_adapter(10), token="secret")
    for method in ("complete", "tokenize", "server_info", "list_adapters"):
        call(server.target, method, *(["hi"] if method in ("complete", "tokenize") else []))
    for method in ("get_adapter", "pin_adapter", "delete_adapter"):
        call(server.target, method, "a", token="secret")
    call(server.target, "complete", "hi", "a", token="secret")
    for seen in server.calls:
        name = getattr(seen.request, "adapter_id", None) or None
        assert seen.metadata.get("x-adapter-id") == name
        assert seen.metadata.get("authorization") == (name and "Bearer secret")
    assert [seen.metadata.get("x-adapter-id") for seen in server.calls].count("a") == 5


def test_an_adapter_id_no_header_can_hold_is_the_servers_to_refuse(
    server: "FakeServer", call: CallClient
) -> None:
    with pytest.raises(NotFound):
        call(server.target, "get_adapter", "ümlaut\n")
    assert server.calls[0].request.adapter_id == "ümlaut\n"


def test_a_token_no_header_can_hold_is_refused(server: "FakeServer", call: CallClient) -> None:
    with pytest.raises(ValueError, match="token"):
        call(server.target, "server_info", token="a\nb")


def test_nobody_there(nobody: str, call: CallClient, make_adapter: MakeAdapter) -> None:
    with pytest.raises(ServerUnreachable, match=f"no server at {nobody}"):
        call(nobody, "complete", "hi")
    start = time.monotonic()
    with pytest.raises(ServerUnreachable, match=f"no server at {nobody}"):
        call(nobody, "upload_adapter", "a", make_adapter(10))
    assert time.monotonic() - start < 5


def test_timeouts(server: "FakeServer", call: CallClient) -> None:
    first: list[inference_pb2.GenerateResponse] = []

    def slow(request: Any, context: Any) -> Iterator[Any]:
        yield from first
        time.sleep(1)

    server.generate = slow
    first.append(inference_pb2.GenerateResponse(started=inference_pb2.Started(request_id="r")))
    with pytest.raises(DeadlineExceeded, match="within the timeout"):
        call(server.target, "complete", "hi", timeout=0.2)
    delta = inference_pb2.Delta(text="x", token_ids=[1, 2])
    first.append(inference_pb2.GenerateResponse(delta=delta))
    with pytest.raises(DeadlineExceeded, match="stopped by the timeout after 2 tokens"):
        call(server.target, "complete", "hi", timeout=0.2)


def test_a_closed_client_says_so(server: "FakeServer", make_adapter: MakeAdapter) -> None:
    client = Client(server.target)
    client.close()
    for use in (lambda: client.complete("hi"), lambda: client.get_adapter("a")):
        with pytest.raises(ValueError, match="is closed"):
            use()

    async def main() -> None:
        async with AsyncClient(server.target) as closed:
            pass
        for use in (closed.complete("hi"), closed.upload_adapter("a", make_adapter(10))):
            with pytest.raises(ValueError, match="is closed"):
                await use

    asyncio.run(main())


def _refusing(code: grpc.StatusCode) -> Callable[[Any, Any], Iterator[Any]]:
    def generate(request: Any, context: Any) -> Iterator[Any]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="so far"))
        context.abort(code, "why")

    return generate


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_status_in_mid_stream(
    server: "FakeServer", call: CallClient, code: grpc.StatusCode
) -> None:
    server.generate = _refusing(code)
    with pytest.raises(LoraplexError) as caught:
        call(server.target, "stream", "hi")
    assert caught.value.code is code


class _Endless:
    """A stream without an end, that knows when its client has gone."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def __call__(self, request: Any, context: Any) -> Iterator[Any]:
        context.add_callback(self.gone.set)
        while context.is_active():
            yield inference_pb2.GenerateResponse(delta=inference_pb2.Delta(text="x"))
            time.sleep(0.001)


def test_closing_a_stream_cancels_the_request(server: "FakeServer") -> None:
    server.generate = endless = _Endless()
    with Client(server.target) as client:
        with closing(client.stream("hi")) as events:
            assert next(events) == Delta("x")
            assert not endless.gone.is_set()
        assert endless.gone.wait(10)


def test_closing_an_async_stream_cancels_the_request(server: "FakeServer") -> None:
    server.generate = endless = _Endless()

    async def main() -> None:
        async with AsyncClient(server.target) as client:
            async with aclosing(client.stream("hi")) as events:
                assert await anext(events) == Delta("x")
                assert not endless.gone.is_set()
            assert await asyncio.to_thread(endless.gone.wait, 10)

    asyncio.run(main())


def test_cancelling_a_task_cancels_the_request(server: "FakeServer") -> None:
    server.generate = endless = _Endless()

    async def main() -> None:
        async with AsyncClient(server.target) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.complete("hi"), 0.2)
            assert await asyncio.to_thread(endless.gone.wait, 10)

    asyncio.run(main())


def test_one_client_serves_many_threads(server: "FakeServer") -> None:
    with Client(server.target) as client, ThreadPoolExecutor(16) as threads:
        texts = [f"text {number}" for number in range(100)]
        answers = list(threads.map(lambda text: client.complete(text, "a").text, texts))
    assert answers == [f"<a>{text}" for text in texts]


def test_one_async_client_serves_many_tasks(server: "FakeServer") -> None:
    async def main() -> list[Completion]:
        async with AsyncClient(server.target) as client:
            return await asyncio.gather(*(client.complete(f"n{n}") for n in range(100)))

    assert [answer.text for answer in asyncio.run(main())] == [f"n{n}" for n in range(100)]


def test_a_client_can_be_used_inside_a_running_loop(server: "FakeServer") -> None:
    async def main() -> str:
        with Client(server.target) as client:
            return client.complete("hi").text

    assert asyncio.run(main()) == "hi"


def test_roots_must_be_a_readable_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Client("127.0.0.1:1", tls=tmp_path / "roots.pem")


def test_a_server_without_tls(server: "FakeServer") -> None:
    with (
        Client(server.target, tls=True) as client,
        pytest.raises(ServerUnreachable, match="cannot reach"),
    ):
        client.server_info(timeout=10)


def test_token_ids_out_of_range_fail_before_anything_is_sent(
    server: "FakeServer", call: CallClient
) -> None:
    with pytest.raises(ValueError, match="-1"):
        call(server.target, "complete", token_ids=[-1])
    assert server.calls == []
