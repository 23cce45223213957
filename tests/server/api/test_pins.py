"""Pins follow their names: through replacements, deletes, refusals and restarts."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpc import StatusCode
from loraplex.api.pins import Pins
from loraplex.api.threads import Background
from loraplex.errors import RequestError
from loraplex_protos.v1 import adapters_pb2

from tests.server.adapters.store_cases import open_store, publish
from tests.server.api.conftest import FINISH, FakeEngine, chunk, header

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

FULL = RequestError("PINS_EXCEED_MEMORY", "they would take more than half")


def test_a_pin_is_the_names(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        first = await api.publish("a1", b"1")
        assert not (await api.get("a1")).pinned
        for _ in range(2):  # idempotent
            assert (await api.pin("a1")).pinned
            assert api.engine.pins == {"a1": first}
        second = await api.publish("a1", b"2", replace=True)
        assert (await api.get("a1")).pinned
        assert api.engine.pins == {"a1": second}
        for _ in range(2):
            assert not (await api.pin("a1", False)).pinned
            assert api.engine.pins == {}
        await api.pin("a1")
        await api.delete("a1")
        assert api.engine.pins == {}
        await api.publish("a1", b"3")
        assert not (await api.get("a1")).pinned

    serve(scenario)


def test_pins_are_there_again_after_a_restart(serve: "Serve") -> None:
    versions: dict[str, str] = {}

    async def first(api: "Api") -> None:
        for name in ("a1", "a2", "a3"):
            versions[name] = await api.publish(name, name.encode())
            await api.pin(name)
        await api.pin("a2", False)

    async def second(api: "Api") -> None:
        while len(api.engine.pins) < 2:
            await asyncio.sleep(0.01)
        assert api.engine.pins == {name: versions[name] for name in ("a1", "a3")}
        assert (await api.get("a1")).pinned

    serve(first)
    serve(second)


def test_a_pin_asked_for_again_is_tried_again(serve: "Serve") -> None:
    """The engine gives up when a load fails, and goes on only when it is asked to."""

    async def scenario(api: "Api") -> None:
        version = await api.publish("a1")
        await api.pin("a1")
        assert (await api.pin("a1")).pinned
        assert api.engine.num_pin_calls == 2
        api.engine.refuse_pins = RequestError("ADAPTER_UNUSABLE", "it is damaged")
        assert (await api.failure(api.pin("a1"))).reason == "ADAPTER_UNUSABLE"
        assert api.engine.pins == {"a1": version}  # which it tells, and changes nothing
        assert (await api.get("a1")).pinned
        assert api.engine.num_pin_calls == 3

    serve(scenario)


def test_a_slow_pin_holds_up_no_other_name(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.publish("a1")
        api.engine.pinning = asyncio.Event()
        pin = asyncio.ensure_future(api.pin("a1"))
        while "a1" not in api.engine.pins:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(api.publish("other"), 5)
        await asyncio.wait_for(api.delete("other"), 5)
        api.engine.pinning.set()
        assert (await pin).pinned

    serve(scenario)


def test_a_pin_that_finds_no_room_changes_nothing(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.publish("a1")
        api.engine.refuse_pins = FULL
        error = await api.failure(api.pin("a1"))
        assert (error.code, error.reason) == (
            StatusCode.RESOURCE_EXHAUSTED,
            "PINS_EXCEED_MEMORY",
        )
        assert api.engine.pins == {}
        assert not (await api.get("a1")).pinned

    serve(scenario)


def test_a_replacement_too_large_for_its_pin_is_told_and_tried_again(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        await api.publish("a1", b"1")
        await api.publish("other")
        await api.pin("a1")
        await api.pin("other")
        api.engine.refuse_pins = FULL
        messages = [header("a1", b"2", replace=True), chunk(0, b"2"), FINISH]
        answer = await api.upload(messages)
        assert answer.created
        assert answer.adapter.pinned
        assert list(answer.warnings)[1:] == [
            "a1 is pinned, but not kept on the device: they would take more than half"
        ]
        assert api.engine.pins.keys() == {"other"}
        api.engine.refuse_pins = None
        await api.delete("other")  # which makes room
        assert api.engine.pins == {"a1": answer.adapter.version}

    serve(scenario)


def test_what_happens_to_a_name_while_it_is_being_pinned(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        async def during_a_pin(what: object) -> object:
            """The pin's outcome; `what` is asked for while the engine still works on it."""
            api.engine.pinning = asyncio.Event()
            pin = asyncio.ensure_future(api.pin("a1"))
            while "a1" not in api.engine.pins:
                await asyncio.sleep(0.01)
            other = asyncio.ensure_future(what)  # type: ignore[call-overload]
            await asyncio.sleep(0.05)
            api.engine.pinning.set()
            return (await asyncio.gather(pin, other, return_exceptions=True))[0]

        await api.publish("a1", b"1")
        await during_a_pin(api.publish("a1", b"2", replace=True))
        assert api.engine.pins == {"a1": (await api.get("a1")).version}
        await api.pin("a1", False)
        assert isinstance(await during_a_pin(api.delete("a1")), Exception)
        assert api.engine.pins == {}

        await api.publish("a1", b"1")
        api.engine.pinning = asyncio.Event()
        request = adapters_pb2.PinAdapterRequest(adapter_id="a1", pinned=True)
        call = api.method("AdapterService", "PinAdapter")(request, timeout=20)
        while "a1" not in api.engine.pins:
            await asyncio.sleep(0.01)
        call.cancel()
        while api.engine.pins:
            await asyncio.sleep(0.01)
        assert not (await api.get("a1")).pinned

    serve(scenario)


def test_a_rank_over_a_smaller_limit_is_not_pinned(tmp_path: Path) -> None:
    """The server came back with a smaller --max-rank."""
    store, engine, background = open_store(tmp_path), FakeEngine(), Background()
    publish(store, "alice")
    store.set_pinned("alice", True)

    async def scenario() -> None:
        pins = Pins(engine, store, background, max_rank=7)
        await pins.restore()
        with pytest.raises(RequestError, match="has rank 8"):
            await pins.pin("alice")

    asyncio.run(scenario())
    assert engine.num_pin_calls == 0
    background.close()
    store.close()
