"""Requests out and values in, without a network."""

from datetime import UTC, datetime
from typing import Any

import pytest
from loraplex_client import wire
from loraplex_client.errors import InternalError
from loraplex_client.values import (
    AdapterState,
    Completion,
    Delta,
    Finished,
    FinishReason,
    Residency,
    Started,
    Timings,
    TokenLogprobs,
    TopLogprob,
    UploadState,
    Usage,
    UsedAdapter,
    Visibility,
)
from loraplex_protos.v1 import adapters_pb2, inference_pb2


def request(**options: Any) -> inference_pb2.GenerateRequest:
    return wire.generate_request("hi", "", None, None, options)


_SAMPLES: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 0,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 0.5,
    "seed": 2**64 - 1,
    "max_tokens": 5,
    "min_tokens": 0,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "ignore_eos": False,
    "logprobs": 0,
}


def _fields(message: Any) -> set[str]:
    return set(message.DESCRIPTOR.fields_by_name)


def test_every_field_of_the_contract_is_an_option() -> None:
    parts = (
        inference_pb2.SamplingParams,
        inference_pb2.StopParams,
        inference_pb2.OutputOptions,
    )
    assert set().union(*map(_fields, parts)) == set(_SAMPLES)
    hints = wire.GenerateOptions.__required_keys__ | wire.GenerateOptions.__optional_keys__
    assert hints == wire.OPTIONS


@pytest.mark.parametrize("name", _SAMPLES)
def test_an_option_sets_its_field_and_nothing_else(name: str) -> None:
    value = _SAMPLES[name]
    made = request(**{name: value})
    part = next(
        part for part in ("sampling", "stop", "output") if name in _fields(getattr(made, part))
    )
    assert [field.name for field, _ in getattr(made, part).ListFields()] == [name]
    actual = getattr(getattr(made, part), name)
    assert (list(actual) if isinstance(value, list) else actual) == value
    assert {field.name for field, _ in made.ListFields()} == {"text", part}


def test_none_is_not_set_and_one_stop_is_a_list_of_one() -> None:
    made = request(temperature=None, stop="end", priority=None)
    assert not made.HasField("sampling")
    assert list(made.stop.stop) == ["end"]


def test_the_call_itself() -> None:
    made = request(request_id="r", adapter_version="v", priority=-3)
    assert (made.request_id, made.adapter_version, made.priority) == ("r", "v", -3)
    members = request(blend={"a": 0.7, "b": -1}).blend
    assert [(member.adapter_id, member.weight) for member in members] == [("a", 0.7), ("b", -1.0)]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, None, None), {}, "exactly one prompt"),
        (("a", None, [1]), {}, "exactly one prompt"),
        (("a", [], None), {}, "exactly one prompt"),
        (("a", None, None), {"temprature": 1.0}, "unknown option 'temprature'"),
        (("a", None, None), {"adapter": "x"}, "unknown option 'adapter'"),
        (("a", None, None), {"tools": []}, "'tools' needs messages="),
        (("a", None, None), {"blend": {}}, "'blend' names no adapter"),
        ((None, [{"role": "user", "text": "a"}], None), {}, "unknown key 'text'"),
        (("a", None, None), {"temperature": "hot"}, "hot|str|float"),
    ],
)
def test_a_wrong_keyword_is_a_type_error(
    arguments: tuple[Any, Any, Any], options: dict[str, Any], message: str
) -> None:
    prompt, messages, token_ids = arguments
    with pytest.raises(TypeError, match=message):
        wire.generate_request(prompt, "", messages, token_ids, options)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (("a", None, None), {"priority": "high"}, TypeError, "^priority: "),
        (("a", None, None), {"max_tokens": -1}, ValueError, "^max_tokens: "),
        (("a", None, None), {"blend": {"b": "x"}}, TypeError, "^blend: "),
        ((None, None, [-1]), {}, ValueError, "^token_ids: "),
        ((None, [{"role": "user", "content": 1}], None), {}, TypeError, "^content: "),
    ],
)
def test_a_wrong_value_is_named(
    arguments: tuple[Any, Any, Any], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    prompt, messages, token_ids = arguments
    with pytest.raises(kind, match=message):
        wire.generate_request(prompt, "", messages, token_ids, options)


def test_every_option_stands_in_the_docstrings() -> None:
    documented = f"{wire.GenerateOptions.__doc__}{wire.ChatOptions.__doc__}"
    assert [name for name in wire.OPTIONS if f"\n    {name} " not in documented] == []


def test_prompts() -> None:
    assert request().WhichOneof("prompt") == "text"
    ids = wire.generate_request(None, "x", None, (1, 2), {})
    assert (ids.adapter_id, list(ids.token_ids.ids)) == ("x", [1, 2])
    assert wire.generate_request("", "", None, None, {}).WhichOneof("prompt") == "text"


def test_chats() -> None:
    messages: list[wire.Message] = [
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    options = {"tools": [{"name": "t"}], "template_kwargs": {"k": 1}}
    chat = wire.generate_request(None, "", messages, None, options).chat
    assert [message.role for message in chat.messages] == ["user", "assistant", "tool"]
    assert chat.messages[0].name == "ann"
    assert chat.messages[1].tool_calls_json == '[{"id": "1"}]'
    assert chat.messages[2].tool_call_id == "1"
    assert (chat.tools_json, chat.template_kwargs_json) == ('[{"name": "t"}]', '{"k": 1}')
    assert not chat.HasField("add_generation_prompt")
    chat = wire.tokenize_request(None, messages, {"add_generation_prompt": False}).chat
    assert chat.HasField("add_generation_prompt")
    assert not chat.add_generation_prompt


@pytest.mark.parametrize(
    ("token", "adapter_id", "expected"),
    [
        (None, "", {}),
        ("t0", "a1", {"authorization": "Bearer t0", "x-adapter-id": "a1"}),
        (None, "ümlaut", {}),
        (None, "a\nb", {}),
    ],
)
def test_metadata(token: str | None, adapter_id: str, expected: dict[str, str]) -> None:
    assert dict(wire.metadata(token, adapter_id)) == expected


def test_events() -> None:
    assert wire.event_of(inference_pb2.GenerateResponse()) is None
    top = inference_pb2.TopLogprob(token_id=9, logprob=-0.5)
    delta = inference_pb2.Delta(
        text="x",
        token_ids=[9],
        logprobs=[inference_pb2.TokenLogprobs(logprob=-0.5, top=[top])],
    )
    assert wire.event_of(inference_pb2.GenerateResponse(delta=delta)) == Delta(
        "x", (9,), (TokenLogprobs(-0.5, (TopLogprob(9, -0.5),)),)
    )


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (inference_pb2.StopMatch(), None),
        (inference_pb2.StopMatch(token_id=0), 0),
        (inference_pb2.StopMatch(text="end"), "end"),
    ],
)
def test_stop_matches(match: inference_pb2.StopMatch, expected: int | str | None) -> None:
    event = wire.event_of(
        inference_pb2.GenerateResponse(finished=inference_pb2.Finished(stop_match=match))
    )
    assert isinstance(event, Finished)
    assert event.stop_match == expected


@pytest.mark.parametrize("number", [0, 1, 2, 3, 99])
def test_finish_reasons_known_and_new(number: int) -> None:
    finished = inference_pb2.Finished()
    finished.MergeFromString(bytes([8, number]))
    event = wire.event_of(inference_pb2.GenerateResponse(finished=finished))
    assert isinstance(event, Finished)
    names = dict(enumerate((FinishReason.STOP_TOKEN, FinishReason.STOP_STRING, "length"), 1))
    assert event.finish_reason == names.get(number, FinishReason.UNKNOWN)


def test_a_completion_is_its_events_put_together() -> None:
    usage, timings = Usage(3, 1, 2), Timings(0.1, 0.2, 0.3, 0.4)
    used = (UsedAdapter("a", "v"),)
    logprobs = (TokenLogprobs(-1.0),)
    assert wire.completion_of(
        [
            Started("r", used, 3, 1),
            Delta("Hel", (1,), logprobs),
            Delta("lo", (2,)),
            Finished(FinishReason.STOP_STRING, "end", usage, timings),
        ]
    ) == Completion(
        "Hello", (1, 2), FinishReason.STOP_STRING, usage, timings, used, logprobs, "end", "r"
    )


@pytest.mark.parametrize("events", [[], [Started("r")], [Started("r"), Delta("x")]])
def test_a_stream_without_its_end_is_an_error(events: list[Any]) -> None:
    with pytest.raises(InternalError, match="before its last event"):
        wire.completion_of(events)


def test_adapters() -> None:
    theirs = adapters_pb2.Adapter(
        adapter_id="a",
        target_modules=["q_proj"],
        state=adapters_pb2.ADAPTER_STATE_QUARANTINED,
        residency=adapters_pb2.ADAPTER_RESIDENCY_DEVICE,
        visibility=adapters_pb2.ADAPTER_VISIBILITY_SHARED,
    )
    theirs.create_time.FromJsonString("2026-01-02T03:04:05Z")
    ours = wire.adapter_of(theirs)
    assert ours.create_time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert ours.last_used_time is None
    assert ours.target_modules == ("q_proj",)
    assert (ours.state, ours.residency, ours.visibility) == (
        AdapterState.QUARANTINED,
        Residency.DEVICE,
        Visibility.SHARED,
    )
    assert wire.adapter_of(adapters_pb2.Adapter()).state is AdapterState.UNKNOWN


def test_uploads() -> None:
    published = adapters_pb2.UPLOAD_STATE_PUBLISHED
    theirs = adapters_pb2.GetUploadResponse(state=published, committed_size=7)
    theirs.expire_time.FromJsonString("2026-01-02T03:04:05Z")
    theirs.adapter.references = 2
    ours = wire.upload_status_of(theirs)
    assert (ours.state, ours.committed_size) == (UploadState.PUBLISHED, 7)
    assert ours.expire_time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert ours.adapter is not None
    assert ours.adapter.references == 2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FinishReason, inference_pb2.FinishReason),
        (UploadState, adapters_pb2.UploadState),
        (AdapterState, adapters_pb2.AdapterState),
        (Residency, adapters_pb2.AdapterResidency),
        (Visibility, adapters_pb2.AdapterVisibility),
    ],
)
def test_our_enums_name_the_contracts(ours: Any, theirs: Any) -> None:
    known = {name for name in theirs.keys() if not name.endswith("UNSPECIFIED")}  # noqa: SIM118
    for member in set(ours) - {ours.UNKNOWN}:
        assert any(name.endswith(f"_{member.name}") for name in known)
    assert len(known) == len(ours) - 1
