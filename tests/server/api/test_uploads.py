"""UploadAdapter over a real socket, into the real store: what publishes, and what does not."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from loraplex.adapters.tiers import Tier
from loraplex_protos.v1 import adapters_pb2

from tests.server.api.conftest import FINISH, UPLOAD_ID, chunk, header

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

INVALID = StatusCode.INVALID_ARGUMENT
DATA = b"weights of an adapter"
MIB = 1 << 20


def whole(adapter_id: str, data: bytes = DATA, /, **changes: Any) -> list[Any]:
    return [header(adapter_id, data, **changes), chunk(0, data), FINISH]


def test_an_upload_is_published_shown_and_deleted(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        messages = [header("a1", DATA), chunk(0, DATA[:5]), chunk(5, DATA[5:]), FINISH]
        answer = await api.upload(messages)
        adapter = answer.adapter
        assert answer.created
        assert list(answer.warnings) == ["a warning"]
        assert (adapter.adapter_id, adapter.size_bytes) == ("a1", len(DATA))
        assert (adapter.rank, list(adapter.target_modules)) == (4, ["q_proj"])
        assert adapter.kind == adapters_pb2.ADAPTER_KIND_LORA
        assert adapter.state == adapters_pb2.ADAPTER_STATE_READY
        assert adapter.residency == adapters_pb2.ADAPTER_RESIDENCY_DISK
        assert adapter.visibility == adapters_pb2.ADAPTER_VISIBILITY_PRIVATE
        assert not adapter.pinned
        assert adapter.HasField("create_time")
        assert not adapter.HasField("last_used_time")
        assert (api.store.blob(adapter.version) / "adapter_model.safetensors").read_bytes() == DATA

        assert await api.get("a1") == adapter
        for tier, residency in (
            (Tier.HOST, adapters_pb2.ADAPTER_RESIDENCY_HOST),
            (Tier.DEVICE, adapters_pb2.ADAPTER_RESIDENCY_DEVICE),
        ):
            api.engine.tiers[adapter.version] = tier
            assert (await api.get("a1")).residency == residency
        call = api.generate(adapter_id="a1", text="x")
        await call.read()
        shown = await api.get("a1")
        assert shown.HasField("last_used_time")
        assert shown.references == 1
        call.cancel()
        while (await api.get("a1")).references:
            await asyncio.sleep(0.01)

        await api.delete("a1")
        error = await api.failure(api.delete("a1"))
        assert error.reason == "ADAPTER_NOT_FOUND"
        assert api.partials() == []

    serve(scenario)


def test_the_same_content_again_needs_no_bytes(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        first = await api.upload(whole("a1"))
        changes = {"sha256": hashlib.sha256(DATA).hexdigest().upper()}
        again = await api.upload([header("a1", DATA, **changes)])
        assert not again.created
        assert again.adapter == first.adapter
        # Under another name the bytes must come, though the content is known.
        error = await api.failure(api.upload([header("a2", DATA)]))
        assert (error.code, error.reason) == (StatusCode.ABORTED, "UPLOAD_INCOMPLETE")
        second = await api.upload(whole("a2"))
        assert second.created
        assert second.adapter.version == first.adapter.version

    serve(scenario)


def test_content_that_rotted_since_the_last_start_comes_again(serve: "Serve") -> None:
    async def first(api: "Api") -> None:
        blob = api.store.blob(await api.publish("a1", DATA))
        (blob / "adapter_model.safetensors").write_bytes(DATA[::-1])

    async def second(api: "Api") -> None:
        error = await api.failure(api.upload([header("a1", DATA)]))
        assert error.reason == "UPLOAD_INCOMPLETE"
        answer = await api.upload(whole("a1"))
        assert (answer.created, answer.adapter.state) == (False, adapters_pb2.ADAPTER_STATE_READY)
        blob = api.store.blob(answer.adapter.version)
        assert (blob / "adapter_model.safetensors").read_bytes() == DATA

    serve(first)
    serve(second)


def test_other_content_under_the_same_name_is_refused_at_once(serve: "Serve") -> None:
    async def never_ends() -> AsyncIterator[Any]:
        yield header("a1", b"other")
        await asyncio.sleep(60)

    async def scenario(api: "Api") -> None:
        await api.upload(whole("a1"))
        error = await api.failure(api.upload(never_ends()))
        assert (error.code, error.reason) == (StatusCode.ALREADY_EXISTS, "ADAPTER_EXISTS")
        other_config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 9})
        messages = whole("a1", adapter_config_json=other_config)
        assert (await api.failure(api.upload(messages))).reason == "ADAPTER_EXISTS"

    serve(scenario)


def test_lists_come_in_pages(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        names = [f"a{number}" for number in range(5)]
        for name in reversed(names):
            await api.publish(name)
        found, token = [], ""
        while True:
            request = adapters_pb2.ListAdaptersRequest(page_size=2, page_token=token)
            page = await api.unary("ListAdapters", request)
            found += [adapter.adapter_id for adapter in page.adapters]
            token = page.next_page_token
            if not token:
                break
        assert found == names

    serve(scenario)


def test_a_client_that_does_not_end_its_stream_is_answered(serve: "Serve") -> None:
    async def messages() -> AsyncIterator[Any]:
        for message in whole("a1"):
            yield message
        await asyncio.sleep(60)

    async def scenario(api: "Api") -> None:
        assert (await api.upload(messages())).created

    serve(scenario)


BAD_HEADERS: list[tuple[dict[str, Any], Any, str, str]] = [
    ({"adapter_id": ""}, INVALID, "INVALID_FIELD", "header.adapter_id"),
    ({"adapter_id": "A"}, INVALID, "INVALID_FIELD", "header.adapter_id"),
    ({"adapter_id": "a..b"}, INVALID, "INVALID_FIELD", "header.adapter_id"),
    ({"upload_id": ""}, INVALID, "INVALID_FIELD", "header.upload_id"),
    ({"upload_id": "../../etc"}, INVALID, "INVALID_FIELD", "header.upload_id"),
    (
        {"upload_id": "8f14e45fceea467fa8d23c59d1b0f0aa"},
        INVALID,
        "INVALID_FIELD",
        "header.upload_id",
    ),
    ({"total_size": 0}, INVALID, "INVALID_FIELD", "header.total_size"),
    ({"total_size": MIB + 1}, INVALID, "ADAPTER_TOO_LARGE", "header.total_size"),
    ({"total_size": 2**64 - 1}, INVALID, "ADAPTER_TOO_LARGE", "header.total_size"),
    ({"sha256": "0" * 63}, INVALID, "INVALID_FIELD", "header.sha256"),
    ({"sha256": "g" * 64}, INVALID, "INVALID_FIELD", "header.sha256"),
    ({"adapter_config_json": ""}, INVALID, "INVALID_FIELD", "header.adapter_config_json"),
    ({"adapter_config_json": "{"}, INVALID, "ADAPTER_INVALID", "adapter_config.json"),
    ({"adapter_config_json": '{"peft_type": "IA3"}'}, INVALID, "ADAPTER_INVALID", "peft_type"),
    ({"visibility": 99}, INVALID, "INVALID_FIELD", "header.visibility"),
    (
        {"visibility": adapters_pb2.ADAPTER_VISIBILITY_SHARED},
        *(StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED", "header.visibility = SHARED"),
    ),
    (
        {"resume_offset": 1},
        *(StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH", "header.resume_offset"),
    ),
    ({"if_match_etag": "e"}, StatusCode.ABORTED, "ETAG_MISMATCH", "header.if_match_etag"),
]

SIZE = len(DATA)
BAD_STREAMS = [
    ([], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([adapters_pb2.UploadAdapterRequest()], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([FINISH], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([chunk(0, DATA)], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([header("a1", DATA), header("a1", DATA)], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([*whole("a1"), chunk(0, DATA)], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([*whole("a1"), FINISH], INVALID, "UPLOAD_OUT_OF_ORDER", None),
    ([header("a1", DATA)], StatusCode.ABORTED, "UPLOAD_INCOMPLETE", None),
    ([header("a1", DATA), FINISH], INVALID, "INVALID_FIELD", "header.total_size"),
    (
        [header("a1", DATA), chunk(0, DATA[1:]), FINISH],
        INVALID,
        "INVALID_FIELD",
        "header.total_size",
    ),
    ([header("a1", DATA), chunk(0, DATA + b"x")], INVALID, "INVALID_FIELD", "chunk.data"),
    ([header("a1", DATA), chunk(0, b"")], INVALID, "INVALID_FIELD", "chunk.data"),
    (
        [header("a1", DATA, total_size=MIB), chunk(0, bytes(MIB + 1))],
        *(INVALID, "INVALID_FIELD", "chunk.data"),
    ),
    (
        [header("a1", DATA), chunk(1, DATA)],
        *(StatusCode.OUT_OF_RANGE, "OFFSET_MISMATCH", "chunk.offset"),
    ),
    (
        [header("a1", DATA), chunk(0, DATA, crc=1)],
        *(StatusCode.DATA_LOSS, "CRC32_MISMATCH", "chunk.crc32"),
    ),
    (
        whole("a1", sha256="0" * 64),
        *(StatusCode.DATA_LOSS, "SHA256_MISMATCH", "header.sha256"),
    ),
    (whole("a1", b"bad"), INVALID, "ADAPTER_INVALID", "model.layers.0.lora_A"),
    ([header("a1", DATA), chunk(0, DATA)], StatusCode.ABORTED, "UPLOAD_INCOMPLETE", None),  # kept
]


def test_bad_uploads_leave_nothing_behind(serve: "Serve") -> None:
    rows = [
        ([header("a1", DATA, **changes), chunk(0, DATA), FINISH], *expected)
        for changes, *expected in BAD_HEADERS
    ] + BAD_STREAMS

    async def scenario(api: "Api") -> None:
        for messages, code, reason, field in rows:
            error = await api.failure(api.upload(messages))
            found = (error.code, error.reason, error.field)
            assert found == (code, reason, field), str(messages)[:300]
            assert len(api.partials()) == (messages is BAD_STREAMS[-1][0])
        assert api.store.list(0, "")[0] == ()
        changes = {"upload_id": UPLOAD_ID}
        assert (await api.upload(whole("a1", **changes))).created  # the name was freed each time
        assert api.sample("loraplex_adapter_uploads_total", code="OK") == 1
        assert api.sample("loraplex_adapter_uploads_total", code="DataLoss") == 2

    serve(scenario)


def test_a_wrong_offset_tells_the_right_one(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        messages = [header("a1", DATA), chunk(0, DATA[:7]), chunk(0, DATA[:7])]
        error = await api.failure(api.upload(messages))
        assert error.reason == "OFFSET_MISMATCH"
        assert error.metadata["committed_size"] == "7"

    serve(scenario)


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["nothing", "header", "chunk"])
def test_a_stream_that_stalls(serve: "Serve", sent: int) -> None:
    async def messages() -> AsyncIterator[Any]:
        for message in whole("a1")[:sent]:
            yield message
        await asyncio.sleep(60)

    async def scenario(api: "Api") -> None:
        error = await api.failure(api.upload(messages()))
        assert (error.code, error.reason) == (StatusCode.DEADLINE_EXCEEDED, "UPLOAD_STALLED")
        assert len(api.partials()) == (sent == 2)  # it may go on

    serve(scenario, stall_seconds=0.2)


def test_one_upload_a_name_and_a_cancelled_one_frees_it(serve: "Serve") -> None:
    held = asyncio.Event()

    async def messages() -> AsyncIterator[Any]:
        yield header("a1", DATA)
        yield chunk(0, DATA)
        held.set()
        await asyncio.sleep(60)

    async def scenario(api: "Api") -> None:
        first = api.method("AdapterService", "UploadAdapter")(messages(), timeout=20)
        await held.wait()
        while not api.partials():
            await asyncio.sleep(0.01)
        error = await api.failure(api.upload(whole("a1", b"other")))
        assert (error.code, error.reason) == (StatusCode.ABORTED, "UPLOAD_IN_PROGRESS")
        assert (await api.upload(whole("a2"))).created
        first.cancel()
        while not api.sample("loraplex_adapter_uploads_total", code="Canceled"):
            await asyncio.sleep(0.01)
        assert (await api.upload(whole("a1", b"other"))).created

    serve(scenario)
