"""What a request's adapters make of its sequence: versions, blends, activated LoRA."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from loraplex.api.adaptation import adaptation, blend_digest, last_occurrence
from loraplex.engine.sequence import BlendPart
from loraplex.errors import RequestError
from loraplex_protos.v1 import inference_pb2

from tests.server.adapters.store_cases import open_store, publish
from tests.server.api.conftest import say

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve

ONE, TWO = "1" * 64, "2" * 64


def members(**weights: float) -> list[Any]:
    return [inference_pb2.BlendMember(adapter_id=n, weight=w) for n, w in weights.items()]


async def used(call: Any) -> list[tuple[str, str]]:
    events = [event async for event in call]
    return [(used.adapter_id, used.version) for used in events[0].started.adapters]


def test_a_version_is_asked_for_by_name(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("x")
        old = await api.publish("a1", b"old")
        wanted: dict[str, Any] = {"adapter_id": "a1", "adapter_version": old, "text": "x"}
        assert await used(api.generate(**wanted)) == [("a1", old)]
        new = await api.publish("a1", b"new", replace=True)
        error = await api.stream_failure(api.generate(**wanted))
        assert (error.code, error.reason) == (StatusCode.FAILED_PRECONDITION, "VERSION_MISMATCH")
        assert error.field == "adapter_version"
        assert error.metadata["version"] == new
        assert new in error.message
        member = inference_pb2.BlendMember(adapter_id="a1", adapter_version=old, weight=1)
        blend = [*members(a2=1), member]
        await api.publish("a2")
        error = await api.stream_failure(api.generate(blend=blend, text="x"))
        assert (error.reason, error.field) == ("VERSION_MISMATCH", "blend[1].adapter_version")
        assert len(api.engine.submitted) == 1
        for name in ("a1", "a2"):
            assert (await api.get(name)).references == 0

    serve(scenario)


def test_a_rank_over_a_smaller_limit_is_refused(tmp_path: Path) -> None:
    """The server came back with a smaller --max-rank."""
    store = open_store(tmp_path)
    version = publish(store, "alice").version

    async def scenario(max_rank: int) -> None:
        request = inference_pb2.GenerateRequest(adapter_id="alice")
        async with adaptation(request, store, max_rank):
            assert store.references(version) == 1

    asyncio.run(scenario(8))
    with pytest.raises(RequestError, match=r"has rank 8, .* server's 7 \(--max-rank\)") as error:
        asyncio.run(scenario(7))
    assert error.value.reason.name == "ADAPTER_UNUSABLE"
    assert store.references(version) == 0
    store.close()


def test_a_blend_holds_all_of_its_members(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        versions = {name: await api.publish(name, name.encode()) for name in ("a1", "a2", "a3")}
        call = aiter(api.generate(request_id="r", blend=members(a2=0.25, a1=-2), text="x"))
        started = (await anext(call)).started
        assert [(u.adapter_id, u.version) for u in started.adapters] == [
            ("a2", versions["a2"]),
            ("a1", versions["a1"]),
        ]
        (sequence,) = api.engine.submitted
        parts = sorted([BlendPart(versions["a2"], 0.25), BlendPart(versions["a1"], -2.0)])
        assert list(sequence.blend) == parts
        assert sequence.digest == blend_digest(parts)
        assert sequence.adapter_id == "a2+a1"
        await api.delete("a1")
        assert api.store.blob(versions["a1"]).is_dir()
        for event in say("ok"):
            api.engine.streams["r"].push(event)
        async for _ in call:
            pass
        while api.store.references(versions["a2"]):
            await asyncio.sleep(0.01)

        # Two names of one content are one member, with the sum of their weights.
        await api.publish("a4", b"a3")
        api.engine.plan = lambda _: say("x")
        await used(api.generate(blend=members(a3=0.5, a2=1, a4=0.25), text="x"))
        parts = sorted([BlendPart(versions["a3"], 0.75), BlendPart(versions["a2"], 1.0)])
        assert list(api.engine.submitted[-1].blend) == parts

    serve(scenario)


def test_members_that_cannot_be_blended(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        for name in ("dora", "alora", "plain"):
            await api.publish(name, name.encode())
        wide = '{"peft_type": "LORA", "r": 33, "lora_alpha": 8}'
        await api.publish("wide", b"wide", adapter_config_json=wide)
        for blend, field in (
            (members(plain=1, dora=1), "blend[1].adapter_id"),
            (members(alora=1, plain=1), "blend[0].adapter_id"),
            (members(plain=1, wide=1, plain2=1), "blend"),  # 16 + 48 + 16 are over 64
        ):
            if len(blend) == 3:
                await api.publish("plain2", b"2")
            error = await api.stream_failure(api.generate(blend=blend, text="x"))
            assert (error.reason, error.field) == ("INVALID_FIELD", field)
        api.engine.plan = lambda _: say("x")
        assert len(await used(api.generate(blend=members(plain=1, wide=1), text="x"))) == 2
        for name in ("dora", "alora", "plain", "wide"):
            while (await api.get(name)).references:
                await asyncio.sleep(0.01)

    serve(scenario)


def test_an_activated_lora_acts_from_its_last_invocation_on(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("x")
        version = await api.publish("a1", b"alora")
        for text, digest, start in (
            ("ab!!cd!!e", version, 6),
            ("!!", version, 0),
            ("a!!!", version, 2),
            ("a! !b", None, 0),  # never invoked: the base alone
        ):
            assert await used(api.generate(adapter_id="a1", text=text)) == [("a1", version)]
            sequence = api.engine.submitted[-1]
            assert (sequence.digest, sequence.adapter_start) == (digest, start)

    serve(scenario)


@pytest.mark.parametrize(
    ("wanted", "tokens", "start"),
    [
        ([1], [], None),
        ([1], [1], 0),
        ([1, 2], [1], None),
        ([1, 2], [1, 2, 3, 1, 2, 1], 3),
        ([1, 1], [1, 1, 1], 1),
        ([1, 2], [2, 1], None),
        ([1, 2, 1], [1, 2, 1, 2, 1, 2], 2),
        ([2, 1, 1, 2], [2, 1, 1, 2, 1, 1, 2, 2], 3),
        ([1, 2, 2], [1, 2, 2, 2], 0),
    ],
)
def test_last_occurrence(wanted: list[int], tokens: list[int], start: int | None) -> None:
    assert last_occurrence(wanted, tokens) == start
    assert last_occurrence(tuple(wanted), tuple(tokens)) == start


class Counted(int):
    """Counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


@pytest.mark.parametrize("odd", [0, 250, 499])
def test_the_search_takes_no_longer_for_tokens_that_repeat(odd: int) -> None:
    wanted = [5] * 500
    wanted[odd] = 6
    Counted.compared = 0
    assert last_occurrence(wanted, [Counted(5)] * 2000) is None
    assert Counted.compared <= 3 * 2000


@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=6), st.lists(st.integers(0, 1), max_size=30)
)
def test_the_search_finds_what_a_plain_one_does(wanted: list[int], tokens: list[int]) -> None:
    starts = [i for i in range(len(tokens)) if tokens[i : i + len(wanted)] == wanted]
    assert last_occurrence(wanted, tokens) == (starts[-1] if starts else None)


def test_a_blends_identity_is_its_members_and_their_weights() -> None:
    made = {
        blend_digest([BlendPart(ONE, first), BlendPart(TWO, second)])
        for first, second in ((1.0, 2.0), (2.0, 1.0), (1.0, 2.0 + 2**-51), (1.0, 0.0), (1.0, -0.0))
    }
    assert len(made) == 4
    assert all(len(digest) == 64 for digest in made)
