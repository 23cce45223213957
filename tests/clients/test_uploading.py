"""Uploads that do not go straight through: early answers, broken streams, files that fail."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from loraplex_client import (
    AdapterFolderError,
    AlreadyExists,
    AsyncClient,
    Client,
    DeadlineExceeded,
    NotFound,
    OutOfRange,
    RetryPolicy,
    Unavailable,
    UploadResult,
    UploadState,
)
from loraplex_client.upload import Progress, upload_id_of
from loraplex_protos.v1 import adapters_pb2

from tests.clients.conftest import refuse

if TYPE_CHECKING:
    from tests.clients.conftest import CuttingProxy, FakeServer

MakeAdapter = Callable[..., Path]
Send = Callable[..., UploadResult]

_AT_ONCE = RetryPolicy(delays=(0.01, 0.3, 0.6))
_LARGE = 24 << 20  # more than the windows of a loopback connection hold


def _sync(
    target: str, path: Path, progress: Progress | None = None, timeout: float | None = 60
) -> UploadResult:
    with Client(target, retry=_AT_ONCE) as client:
        return client.upload_adapter("a", path, progress=progress, timeout=timeout)


def _async(
    target: str, path: Path, progress: Progress | None = None, timeout: float | None = 60
) -> UploadResult:
    async def main() -> UploadResult:
        async with AsyncClient(target, retry=_AT_ONCE) as client:
            return await client.upload_adapter("a", path, progress=progress, timeout=timeout)

    return asyncio.run(main())


@pytest.fixture(params=[_sync, _async], ids=["sync", "async"])
def send(request: pytest.FixtureRequest) -> Send:
    made: Send = request.param
    return made


def _first(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
    """Reads the header alone."""
    header = next(requests).header
    server.saw("UploadAdapter", header, context)
    return header


def test_an_early_ok(server: "FakeServer", send: Send, make_adapter: MakeAdapter) -> None:
    def answer_early(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        header = _first(server, requests, context)
        return adapters_pb2.UploadAdapterResponse(adapter=server.store(header, b""))

    server.upload = answer_early
    result = send(server.target, make_adapter(_LARGE))
    assert (result.created, result.adapter.adapter_id) == (False, "a")


def test_an_early_refusal_is_final(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    def refuse_early(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        _first(server, requests, context)
        context.abort(grpc.StatusCode.ALREADY_EXISTS, "the name holds other content")

    server.upload = refuse_early
    with pytest.raises(AlreadyExists, match="other content"):
        send(server.target, make_adapter(_LARGE))
    assert len(server.calls) == 1


@pytest.mark.parametrize("limit", [100_000, 10 << 20])
def test_a_broken_connection_goes_on_where_it_broke(
    server: "FakeServer",
    send: Send,
    make_adapter: MakeAdapter,
    cutting_proxy: Callable[..., "CuttingProxy"],
    limit: int,
) -> None:
    proxy = cutting_proxy(server.target, cuts=2, limit=limit)
    folder = make_adapter(_LARGE)
    seen: list[int] = []
    assert send(proxy.target, folder, lambda sent, total: seen.append(sent)).created
    assert proxy.connections == 3
    assert server.weights["a"] == (folder / "adapter_model.safetensors").read_bytes()
    assert seen[-1] == _LARGE
    headers = [call.request for call in server.calls]
    assert len({header.upload_id for header in headers}) == 1
    offsets = [header.resume_offset for header in headers]
    assert offsets == sorted(offsets)
    assert set(offsets) <= set(seen)  # each try reports from where it begins
    if limit > 1 << 20:
        assert offsets[-1] > 1 << 20


def test_tries_are_bounded(
    server: "FakeServer",
    send: Send,
    make_adapter: MakeAdapter,
    cutting_proxy: Callable[..., "CuttingProxy"],
) -> None:
    proxy = cutting_proxy(server.target, cuts=100, limit=1 << 20)
    with pytest.raises(Unavailable, match="the connection to"):
        send(proxy.target, make_adapter(_LARGE))
    assert proxy.connections == 4
    assert server.weights == {}


def test_what_an_earlier_command_sent_is_not_sent_again(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(_LARGE)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    upload_id = upload_id_of("a", sha256(weights).hexdigest(), _config(folder))
    server.partials[upload_id] = weights[: (9 << 20) + 7]
    seen: list[int] = []
    assert send(server.target, folder, lambda sent, total: seen.append(sent)).created
    assert server.weights["a"] == weights
    assert [call.request.resume_offset for call in server.calls] == [0, (9 << 20) + 7]
    assert (9 << 20) + 7 in seen

    server.partials[upload_id] = weights  # only the finish did not come
    assert not send(server.target, folder).created


def _config(folder: Path) -> str:
    return (folder / "adapter_config.json").read_text()


def test_how_far_an_upload_came(server: "FakeServer") -> None:
    server.partials["u"] = bytes(17)
    with Client(server.target) as client:
        status = client.get_upload("u")
        assert (status.state, status.committed_size) == (UploadState.ACTIVE, 17)
        assert (status.expire_time, status.adapter) == (None, None)
        with pytest.raises(NotFound):
            client.get_upload("v")


def test_a_server_that_never_agrees_is_given_up(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    def confused(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        committed = 7 if _first(server, requests, context).resume_offset == 0 else 0
        out_of_range = (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH", "not there")
        refuse(context, *out_of_range, committed_size=str(committed))

    server.upload = confused
    with pytest.raises(OutOfRange, match="not there"):
        send(server.target, make_adapter(10))
    assert len(server.calls) < 10


def test_the_timeout_holds_for_all_tries_together(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    def stall(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        _first(server, requests, context)
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(10)

    server.upload = stall
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        send(server.target, make_adapter(10), timeout=0.5)
    assert time.monotonic() - start < 5


def test_a_callback_that_fails_ends_the_upload_with_its_own_error(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    def progress(sent: int, total: int) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        send(server.target, make_adapter(_LARGE), progress)
    assert server.weights == {}


def test_a_file_that_shrinks_is_not_published(
    server: "FakeServer", send: Send, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(_LARGE)

    def shrink(sent: int, total: int) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(AdapterFolderError, match="shrank"):
        send(server.target, folder, shrink)
    assert server.weights == {}


def test_async_progress_is_called_on_the_event_loop(
    server: "FakeServer", make_adapter: MakeAdapter
) -> None:
    threads: set[int] = set()
    _async(
        server.target, make_adapter(_LARGE), lambda sent, total: threads.add(threading.get_ident())
    )
    assert threads == {threading.get_ident()}


def test_cancelling_a_task_cancels_its_upload(
    server: "FakeServer", make_adapter: MakeAdapter
) -> None:
    started, gone = threading.Event(), threading.Event()

    def stall(server: "FakeServer", requests: Iterator[Any], context: Any) -> Any:
        context.add_callback(gone.set)
        started.set()
        gone.wait(30)

    async def main() -> None:
        async with AsyncClient(server.target) as client:
            task = asyncio.create_task(client.upload_adapter("a", make_adapter(_LARGE)))
            await asyncio.to_thread(started.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(gone.wait, 30)

    server.upload = stall
    asyncio.run(main())
    assert server.weights == {}


def test_a_folder_that_is_no_adapter_is_never_sent(
    server: "FakeServer", send: Send, tmp_path: Path
) -> None:
    with pytest.raises(AdapterFolderError):
        send(server.target, tmp_path / "nothing")
    assert server.calls == []
