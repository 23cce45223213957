"""Generate over a real socket: what the client sees, and what the engine is told."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode
from loraplex.adapters.store import TENANT
from loraplex.api.inference import FEATURES
from loraplex.engine.sequence import FinishReason, Logprobs, SamplingParams, StopParams, Tokens
from loraplex.engine.stream import Event
from loraplex.errors import RequestError
from loraplex_protos.v1 import adapters_pb2, inference_pb2

from tests.server.api.conftest import (
    EOS,
    MODEL,
    SPECIAL,
    finished,
    say,
)

if TYPE_CHECKING:
    from tests.server.api.conftest import Api, Serve


async def collect(call: Any) -> tuple[Any, list[Any], Any]:
    """Started, the deltas and Finished, which must come in that order."""
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(events) - 2), "finished"]
    return events[0].started, [event.delta for event in events[1:-1]], events[-1].finished


def text_of(deltas: list[Any]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Any]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def test_a_completion_on_the_base(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("héllo", end=FinishReason.STOP_TOKEN)
        call = api.generate(request_id="my.request-1", text="abc")
        metadata = dict(await call.initial_metadata())
        started, deltas, end = await collect(call)
        assert metadata["x-request-id"] == started.request_id == "my.request-1"
        assert (started.prompt_tokens, started.cached_tokens) == (3, 0)
        assert list(started.adapters) == []
        assert text_of(deltas) == "héllo"
        assert ids_of(deltas) == [*"héllo".encode(), EOS]
        assert end.finish_reason == inference_pb2.FINISH_REASON_STOP_TOKEN
        assert end.stop_match.token_id == EOS
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 7)
        assert (end.timings.queue, end.timings.prefill) == (0.5, 0.25)
        assert (end.timings.decode, end.timings.adapter_wait) == (2.0, 0.125)
        assert api.engine.aborted == []

    serve(scenario)


def test_what_the_engine_is_given(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("x")
        await collect(api.generate(text="abc"))
        await collect(api.generate(text="abc"))
        plain, again = api.engine.submitted
        assert plain.tenant == TENANT
        assert list(plain.prompt_token_ids) == [97, 98, 99]
        assert plain.digest is None
        assert plain.stop == StopParams(400 - 3, 0, frozenset({EOS}))  # what KV memory leaves
        assert (plain.sampling.temperature, plain.sampling.top_p) == (0.6, 0.9)
        assert plain.sampling.num_logprobs is None
        assert plain.sampling.seed != again.sampling.seed
        assert plain.request_id != again.request_id

        sampling: dict[str, Any] = {
            "temperature": 0.0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.25,
            "repetition_penalty": 1.5,
            "presence_penalty": -2.0,
            "frequency_penalty": 2.0,
            "seed": 2**64 - 1,
        }
        call = api.generate(
            token_ids=inference_pb2.TokenIds(ids=[1, 2, 259]),
            sampling=inference_pb2.SamplingParams(**sampling),
            stop=inference_pb2.StopParams(
                max_tokens=9, min_tokens=2, stop_token_ids=[5], ignore_eos=True
            ),
            output=inference_pb2.OutputOptions(logprobs=0),
        )
        await collect(call)
        full = api.engine.submitted[-1]
        assert list(full.prompt_token_ids) == [1, 2, 259]
        assert full.sampling == SamplingParams(**sampling, num_logprobs=0)
        assert full.stop == StopParams(9, 2, frozenset({5}))

        await collect(api.generate(text="abc", priority=-3, timeout=15))
        urgent = api.engine.submitted[-1]
        assert (plain.priority, urgent.priority) == (0, -3)
        assert urgent.deadline is not None
        assert 5 < urgent.deadline - time.monotonic() < 16
        await collect(api.generate(text="abc", timeout=None))
        assert api.engine.submitted[-1].deadline is None

    serve(scenario)


def test_chat_and_tokenize_go_through_the_template(serve: "Serve") -> None:
    chat = inference_pb2.Chat(
        messages=[
            inference_pb2.ChatMessage(role="user", content="hi", name="ann"),
            inference_pb2.ChatMessage(role="assistant", tool_calls_json='[{"id": 1}]'),
            inference_pb2.ChatMessage(role="tool", content="42", tool_call_id="c1"),
        ],
        tools_json="[1]",
        template_kwargs_json='{"a": 2}',
        add_generation_prompt=False,
    )
    messages = (
        '[{"role": "user", "content": "hi", "name": "ann"},'
        ' {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},'
        ' {"role": "tool", "content": "42", "tool_call_id": "c1"}]'
    )
    plain = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user")])

    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("x")
        rendered = f'[{messages}, [1], {{"a": 2}}, false]'
        await collect(api.generate(chat=chat))
        assert bytes(api.engine.submitted[0].prompt_token_ids).decode() == rendered
        for prompt, expected in (
            ({"chat": chat}, rendered),
            ({"chat": plain}, '[[{"role": "user", "content": ""}], null, null, true]'),
            ({"text": "abc"}, "abc"),
            ({"text": ""}, ""),
        ):
            answer = await api.unary("Tokenize", inference_pb2.TokenizeRequest(**prompt))
            assert bytes(answer.token_ids).decode() == expected

    serve(scenario)


def test_server_info(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        info = await api.unary("GetServerInfo", inference_pb2.GetServerInfoRequest())
        assert (info.model, info.base_id, info.quantization) == ("fake-model", "b" * 64, "nf4")
        assert (info.architecture, info.device) == ("LlamaForCausalLM", "cpu")
        assert (info.dtype, info.vocab_size, info.context_length) == ("float32", 260, 512)
        for field in info.limits.DESCRIPTOR.fields_by_name:
            assert getattr(info.limits, field) == getattr(MODEL.limits, field)
        assert info.version
        assert list(info.features) == list(FEATURES)

    serve(scenario)


@pytest.mark.parametrize(
    ("sampled", "stops", "min_tokens", "text", "num_tokens", "match"),
    [
        ("one stop two", ["stop"], 0, "one ", 8, "stop"),
        ("one stop two", ["nope", " st"], 0, "one", 6, " st"),
        ("one sto", ["stop"], 0, "one sto", 7, None),  # held back, then flushed
        ("stop and stop", ["stop"], 5, "stop and ", 13, "stop"),
        ("stopstop", ["stop"], 4, "stop", 8, "stop"),
        ("été", ["t"], 0, "é", 3, "t"),
    ],
)
def test_stop_strings(
    serve: "Serve",
    sampled: str,
    stops: list[str],
    min_tokens: int,
    text: str,
    num_tokens: int,
    match: str | None,
) -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say(sampled)
        stop = inference_pb2.StopParams(stop=stops, min_tokens=min_tokens)
        started, deltas, end = await collect(api.generate(text="x", stop=stop))
        assert text_of(deltas) == text
        assert ids_of(deltas) == list(sampled.encode()[:num_tokens])
        assert end.usage.completion_tokens == num_tokens
        if match is None:
            assert end.finish_reason == inference_pb2.FINISH_REASON_LENGTH
            assert not end.HasField("stop_match")
            assert api.engine.aborted == []
        else:
            assert end.finish_reason == inference_pb2.FINISH_REASON_STOP_STRING
            assert end.stop_match.text == match
            assert api.engine.aborted == [started.request_id]

    serve(scenario)


def test_special_tokens_are_no_text_and_half_a_code_point_is_flushed(serve: "Serve") -> None:
    events: list[Event] = [Tokens((SPECIAL, 97)), Tokens((0xC3,)), finished(FinishReason.LENGTH)]

    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: events
        _, deltas, end = await collect(api.generate(text="x"))
        assert text_of(deltas) == "a\N{REPLACEMENT CHARACTER}"
        assert ids_of(deltas) == [SPECIAL, 97, 0xC3]
        assert end.usage.completion_tokens == 3

    serve(scenario)


def test_logprobs_stand_beside_their_tokens(serve: "Serve") -> None:
    entries = (Logprobs(-0.5, ((97, -0.5), (98, -1.5))), Logprobs(-2.0, ()))
    events: list[Event] = [Tokens((97, 98), entries), finished(FinishReason.LENGTH)]

    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: events
        output = inference_pb2.OutputOptions(logprobs=2)
        _, deltas, _ = await collect(api.generate(text="x", output=output))
        found = [entry for delta in deltas for entry in delta.logprobs]
        assert [entry.logprob for entry in found] == [-0.5, -2.0]
        assert [(top.token_id, top.logprob) for top in found[0].top] == [(97, -0.5), (98, -1.5)]
        assert api.engine.submitted[0].sampling.num_logprobs == 2

    serve(scenario)


def test_tokens_stream_as_they_come_and_join_while_nobody_reads(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        call = api.generate(request_id="r", text="x")
        assert (await call.read()).HasField("started")
        stream = api.engine.streams["r"]
        stream.push(Tokens((97,)))
        assert (await call.read()).delta.text == "a"
        for token_id in b"bcd":
            stream.push(Tokens((token_id,)))
        assert (await call.read()).delta.text == "bcd"
        stream.push(finished(FinishReason.LENGTH))
        assert (await call.read()).finished.usage.completion_tokens == 4
        assert not await call.read()  # the end of the stream

    serve(scenario)


def test_a_request_runs_on_one_version_of_its_adapter(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        version = await api.publish("a1")
        blob = api.store.blob(version)
        call = aiter(api.generate(request_id="r", adapter_id="a1", text="x"))
        started = (await anext(call)).started
        assert [(used.adapter_id, used.version) for used in started.adapters] == [("a1", version)]
        assert api.engine.submitted[0].digest == version
        assert api.engine.submitted[0].adapter_id == "a1"

        delete = adapters_pb2.DeleteAdapterRequest(adapter_id="a1")
        await api.unary("DeleteAdapter", delete)
        again = await api.stream_failure(api.generate(adapter_id="a1", text="x"))
        assert again.reason == "ADAPTER_NOT_FOUND"
        assert blob.is_dir()  # the running request still holds it

        for event in say("ok"):
            api.engine.streams["r"].push(event)
        assert text_of([event.delta async for event in call]) == "ok"
        while blob.is_dir():
            await asyncio.sleep(0.01)

    serve(scenario)


def test_adapters_that_cannot_be_used(serve: "Serve") -> None:
    async def spoil(api: "Api") -> None:
        await api.publish("foreign")
        await api.publish("large", b"large")
        manifests = api.folder / "manifests" / "default"
        manifest = manifests / "foreign.json"
        manifest.write_text(manifest.read_text().replace(MODEL.base_id, "c" * 64))
        manifest = manifests / "large.json"
        manifest.write_text(manifest.read_text().replace('"rank": 4', '"rank": 65'))
        (manifests / "broken.json").write_text("{")

    async def scenario(api: "Api") -> None:
        for adapter_id in ("foreign", "large", "broken"):
            error = await api.stream_failure(api.generate(adapter_id=adapter_id, text="x"))
            assert (error.code, error.reason) == (
                StatusCode.FAILED_PRECONDITION,
                "ADAPTER_UNUSABLE",
            )
        shown = await api.unary("ListAdapters", adapters_pb2.ListAdaptersRequest())
        assert [(a.adapter_id, a.state) for a in shown.adapters] == [
            ("broken", adapters_pb2.ADAPTER_STATE_QUARANTINED),
            ("foreign", adapters_pb2.ADAPTER_STATE_INCOMPATIBLE),
            ("large", adapters_pb2.ADAPTER_STATE_INCOMPATIBLE),
        ]
        assert api.engine.submitted == []

    serve(spoil)
    serve(scenario)


@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
@pytest.mark.parametrize("busy", [False, True], ids=["waiting", "streaming"])
def test_a_client_that_goes_away_frees_the_engine_and_the_adapter(
    serve: "Serve", how: str, busy: bool
) -> None:
    async def scenario(api: "Api") -> None:
        blob = api.store.blob(await api.publish("a1"))
        timeout = 0.5 if how == "deadline" else 20
        call = api.generate(request_id="r", adapter_id="a1", text="x", timeout=timeout)
        assert (await call.read()).HasField("started")
        if busy:  # more than the client's window holds, so that the server is stuck in a write
            logprobs = (Logprobs(-1.0, ((1, -1.0),) * 20_000),)
            for _ in range(8):
                api.engine.streams["r"].push(Tokens((97,), logprobs))
                await asyncio.sleep(0.02)
            assert (api.sample("loraplex_generation_tokens_total") or 0) < 8
        begun = time.monotonic()
        if how == "cancel":
            call.cancel()
        elif how == "disconnect":
            await api.channel.close()
        await api.engine.until(lambda: api.engine.aborted)
        assert time.monotonic() - begun < 3
        assert api.engine.aborted == ["r"]
        await asyncio.to_thread(api.store.delete, "a1")
        while blob.is_dir():
            await asyncio.sleep(0.01)

    serve(scenario)


def test_errors_of_the_engine_end_the_call_with_their_status(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        for reason, code in (
            ("OUT_OF_MEMORY", StatusCode.RESOURCE_EXHAUSTED),
            ("SLOW_READER", StatusCode.ABORTED),
            ("NAN_LOGITS", StatusCode.INTERNAL),
        ):
            events: list[Event] = [Tokens((97,)), RequestError(reason, "as it is")]
            api.engine.plan = lambda _, events=events: events  # type: ignore[misc]
            error = await api.stream_failure(api.generate(text="x"))
            assert (error.code, error.reason, error.message) == (code, reason, "as it is")
        api.engine.refuse = RequestError("QUEUE_FULL", "full", retry_after=1.5)
        error = await api.stream_failure(api.generate(text="x"))
        assert (error.code, error.retry_after) == (StatusCode.RESOURCE_EXHAUSTED, 1.5)
        assert api.sample("loraplex_requests_rejected_total", reason="QUEUE_FULL") == 1
        assert api.sample("loraplex_requests_rejected_total", reason="NAN_LOGITS") is None
        assert api.sample("loraplex_request_finished_total", reason="error") == 3

    serve(scenario)


def test_a_live_request_id_is_refused_and_the_first_goes_on(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        first = aiter(api.generate(request_id="r", text="x"))
        await anext(first)
        error = await api.stream_failure(api.generate(request_id="r", text="x"))
        assert (error.code, error.reason) == (StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
        assert api.engine.aborted == []
        for event in say("ok"):
            api.engine.streams["r"].push(event)
        assert text_of([event.delta async for event in first]) == "ok"
        api.engine.plan = lambda _: say("again")
        _, deltas, _ = await collect(api.generate(request_id="r", text="x"))
        assert text_of(deltas) == "again"

    serve(scenario)


def test_many_at_once(serve: "Serve") -> None:
    async def one(api: "Api", number: int) -> str:
        _, deltas, _ = await collect(api.generate(request_id=f"r{number}", text="x"))
        return text_of(deltas)

    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda sequence: say(f"I am {sequence.request_id}")
        texts = await asyncio.gather(*(one(api, number) for number in range(64)))
        assert texts == [f"I am r{number}" for number in range(64)]

    serve(scenario)


def test_metrics_of_requests(serve: "Serve") -> None:
    async def scenario(api: "Api") -> None:
        api.engine.plan = lambda _: say("hey")
        await collect(api.generate(text="abcde"))
        api.engine.plan = lambda _: ()
        call = api.generate(request_id="r", text="x")
        await call.read()
        call.cancel()
        await api.engine.until(lambda: api.engine.aborted)
        await api.server.drain(5)
        model = {"model": "fake-model"}
        assert api.sample("loraplex_prompt_tokens_total") == 6
        assert api.sample("loraplex_generation_tokens_total") == 3
        assert api.sample("loraplex_time_to_first_token_seconds_count", **model) == 1
        assert api.sample("loraplex_e2e_request_latency_seconds_count", **model) == 1
        assert api.sample("loraplex_request_queue_time_seconds_sum", **model) == 0.5
        assert api.sample("loraplex_request_finished_total", reason="length") == 1
        assert api.sample("loraplex_request_finished_total", reason="cancelled") == 1
        labels = {
            "grpc_type": "server_stream",
            "grpc_service": "loraplex.v1.InferenceService",
            "grpc_method": "Generate",
        }
        assert api.sample("grpc_server_handled_total", grpc_code="OK", **labels) == 1
        assert api.sample("grpc_server_handled_total", grpc_code="Canceled", **labels) == 1

    serve(scenario)
