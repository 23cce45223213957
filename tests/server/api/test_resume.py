"""Uploads that break off and go on, that meet another one, and that change what a name holds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from loraplex_protos.v1 import adapters_pb2

from tests.server.api.conftest import CONFIG_JSON, FINISH, UPLOAD_ID, chunk, header, say

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

DATA = bytes(range(200))
RESUMED = adapters_pb2.UPLOAD_STATE_ACTIVE
PUBLISHED = adapters_pb2.UPLOAD_STATE_PUBLISHED


def begin(**changes: Any) -> Any:
    return header("a1", DATA, **({"upload_id": UPLOAD_ID} | changes))


def rest(offset: int, **changes: Any) -> list[Any]:
    last = [chunk(offset, DATA[offset:])] if offset < len(DATA) else []
    return [begin(resume_offset=offset, **changes), *last, FINISH]


class Held:
    """A stream that sends its messages and then nothing more until it is let go."""

    def __init__(self, api: "Api", *messages: Any) -> None:
        self._messages = messages
        self._go = asyncio.Event()
        self.call = api.method("AdapterService", "UploadAdapter")(self._send(), timeout=20)

    async def _send(self) -> AsyncIterator[Any]:
        for message in self._messages:
            yield message
        await self._go.wait()

    def end(self) -> None:
        self._go.set()


async def arrived(api: "Api", size: int) -> Path:
    """Once so many bytes are in the one partial there is."""
    while [path.stat().st_size for path in api.partials()] != [size]:
        await asyncio.sleep(0.01)
    (path,) = api.partials()
    return path


@pytest.mark.parametrize("how", ["end", "cancel", "stall", "bad crc32", "wrong offset"])
def test_what_came_before_a_stream_broke_need_not_come_again(serve: "Serve", how: str) -> None:
    async def scenario(api: "Api") -> None:
        wrong = {"bad crc32": [chunk(70, b"x", crc=1)], "wrong offset": [chunk(71, b"x")]}
        held = Held(api, begin(), chunk(0, DATA[:70]), *wrong.get(how, []))
        if how in ("end", "cancel"):
            await arrived(api, 70)
            held.end() if how == "end" else held.call.cancel()
        await held.call.code()  # it has ended
        while True:  # a cancelled call ends here before it ends there
            status = await api.upload_status()
            if status.committed_size:
                break
        assert (status.state, status.committed_size) == (RESUMED, 70)
        assert status.HasField("expire_time")
        assert not status.HasField("adapter")

        error = await api.failure(api.upload([begin(), chunk(0, DATA)]))
        assert (error.code, error.reason) == (StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH")
        assert error.metadata["committed_size"] == "70"
        answer = await api.upload(rest(70))
        assert answer.created
        blob = api.store.blob(answer.adapter.version)
        assert (blob / "adapter_model.safetensors").read_bytes() == DATA
        status = await api.upload_status(UPLOAD_ID.upper())
        assert (status.state, status.committed_size) == (PUBLISHED, len(DATA))
        assert status.adapter == answer.adapter
        again = await api.upload([begin()])
        assert (again.created, again.adapter) == (False, answer.adapter)

    serve(scenario, stall_seconds=0.3 if how == "stall" else 10)


def test_the_next_stream_takes_over_from_one_that_hangs(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        old = Held(api, begin(), chunk(0, DATA[:70]))
        await arrived(api, 70)
        for changes, field in (
            ({"sha256": "0" * 64}, "sha256"),
            ({"total_size": 1}, "total_size"),
            ({"adapter_id": "a2"}, "adapter_id"),
            ({"adapter_config_json": CONFIG_JSON.replace("4", "5")}, "adapter_config_json"),
        ):
            error = await api.failure(api.upload(rest(70, **changes)))
            assert (error.reason, error.field) == ("INVALID_FIELD", f"header.{field}")
        assert not old.call.done()
        assert (await api.upload(rest(70))).created
        error = await api.failure(old.call)
        assert (error.code, error.reason) == (StatusCode.ABORTED, "UPLOAD_TAKEN_OVER")

    serve(scenario)


def test_of_many_streams_of_one_upload_one_publishes(serve: "Serve") -> None:
    """As a client that loses its connection again and again leaves them behind."""

    async def scenario(api: "Api") -> None:
        held = [Held(api, begin(), chunk(0, DATA[:70])) for _ in range(4)]
        while sum(one.call.done() for one in held) < 3:
            await asyncio.sleep(0.01)
        for committed in (70, 0):  # 0: they came before the last one's chunk had
            answers = await asyncio.gather(
                *(api.upload(rest(committed)) for _ in range(4)), return_exceptions=True
            )
            if any(getattr(answer, "created", False) for answer in answers):
                break
        assert any(getattr(answer, "created", False) for answer in answers)
        assert (await api.get("a1")).size_bytes == len(DATA)
        for one in held:
            one.end()
        await asyncio.gather(*(one.call.code() for one in held))
        assert api.partials() == []

    serve(scenario)


def test_the_finish_alone_can_come_later(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.failure(api.upload([begin(), chunk(0, DATA)]))
        assert (await api.upload_status()).committed_size == len(DATA)
        assert (await api.upload(rest(len(DATA)))).created

    serve(scenario)


def test_what_is_of_no_use_is_not_kept(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        for bad in (
            [begin(sha256="0" * 64), chunk(0, DATA), FINISH],
            [begin(), chunk(0, DATA[:7]), FINISH],
            [begin(), chunk(0, DATA[:7]), begin()],
        ):
            await api.failure(api.upload(bad))
            error = await api.failure(api.upload_status())
            assert (error.code, error.reason) == (StatusCode.NOT_FOUND, "UPLOAD_NOT_FOUND")
        error = await api.failure(api.upload(rest(7)))  # as if it had expired
        assert error.metadata["committed_size"] == "0"

    serve(scenario)


def test_a_partial_survives_the_server(serve: "Serve") -> None:
    async def first(api: "Api") -> None:
        Held(api, begin(), chunk(0, DATA[:70]))
        await arrived(api, 70)
        await api.server.drain(0)

    async def second(api: "Api") -> None:
        assert (await api.upload_status()).committed_size == 70
        assert (await api.upload(rest(70))).created

    serve(first)
    serve(second)


def test_replace_flips_the_name_and_running_requests_stay(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        old = await api.publish("a1", b"old")
        blob = api.store.blob(old)
        call = aiter(api.generate(request_id="r", adapter_id="a1", text="x"))
        await anext(call)
        await api.failure(api.upload([header("a1", b"new"), chunk(0, b"new"), FINISH]))
        new = await api.publish("a1", b"new", replace=True)
        assert new != old

        api.engine.plan = lambda _: say("new")
        async for event in api.generate(adapter_id="a1", text="x"):
            if event.HasField("started"):
                assert [used.version for used in event.started.adapters] == [new]
        assert [sequence.digest for sequence in api.engine.submitted] == [old, new]
        assert blob.is_dir()
        while (await api.get("a1")).references:  # until the request that ended let go
            await asyncio.sleep(0.01)
        assert api.store.references(old) == 1
        for event in say("ok"):
            api.engine.streams["r"].push(event)
        assert b"".join([e.delta.text.encode() async for e in call]) == b"ok"
        while blob.is_dir():
            await asyncio.sleep(0.01)

        # And back again, though an upload of that id was published within the hour.
        changes = {"upload_id": UPLOAD_ID, "replace": True}
        assert await api.publish("a1", DATA, **changes) != new
        await api.publish("a1", b"new", replace=True)
        back = await api.publish("a1", DATA, **changes)
        assert (await api.get("a1")).version == back

    serve(scenario)


def test_etags(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.publish("a1", b"1")
        first = (await api.get("a1")).etag
        await api.publish("a1", b"2", if_match_etag=first)
        second = (await api.get("a1")).etag
        assert second != first
        stale = [header("a1", b"3", if_match_etag=first)]
        error = await api.failure(api.upload(stale))
        assert (error.code, error.reason) == (StatusCode.ABORTED, "ETAG_MISMATCH")
        assert error.field == "header.if_match_etag"
        same = await api.upload([header("a1", b"2", if_match_etag=first)])
        assert not same.created  # whatever the etag

    serve(scenario)


def test_an_etag_is_checked_again_at_the_finish_and_the_bytes_are_kept(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.publish("a1", b"1")
        etag = (await api.get("a1")).etag
        go = asyncio.Event()

        async def late() -> AsyncIterator[Any]:
            yield begin(if_match_etag=etag)
            yield chunk(0, DATA)
            await go.wait()
            yield FINISH

        call = api.method("AdapterService", "UploadAdapter")(late(), timeout=20)
        await arrived(api, len(DATA))
        await api.delete("a1")
        go.set()
        assert (await api.failure(call)).reason == "ETAG_MISMATCH"
        assert (await api.failure(api.get("a1"))).reason == "ADAPTER_NOT_FOUND"
        assert (await api.upload(rest(len(DATA)))).created

    serve(scenario)
