"""Server-sent events cut anywhere, and requests that run together."""

import asyncio

import pytest
from child import BenchmarkError
from peers import llama_cpp, vllm_server
from peers.streams import Events, Got, request_bytes, together
from waves import Wave

WAVE = Wave(((1,), (2,)), (None, None), max_tokens=2, seconds=600.0)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_whole_however_the_bytes_arrive(size: int) -> None:
    said = b'data: {"a": 1}\n\n: ping\r\n\r\ndata: {"b": "x\\n\\ny"}\r\n\r\ndata: [DONE]\n\n'
    events = Events()
    pieces = [said[i : i + size] for i in range(0, len(said), size)]

    assert [e for piece in pieces for e in events.feed(piece)] == [{"a": 1}, {"b": "x\n\ny"}]


def test_tokens_of_each_servers_events() -> None:
    vllm = {"choices": [{"text": "o", "token_ids": [95, 28]}]}

    assert vllm_server.tokens(vllm, 0) == [95, 28]
    assert vllm_server.tokens({"choices": [{"text": "", "token_ids": None}]}, 0) == []
    assert vllm_server.tokens({"choices": [], "usage": {}}, 0) == []
    assert llama_cpp.tokens({"content": "o", "tokens": [95], "stop": False}, 0) == [95]
    last = {"content": "", "tokens": [95], "stop": True, "tokens_predicted": 4}
    assert llama_cpp.tokens(last, 4) == ()
    assert llama_cpp.tokens(last, 3) == (llama_cpp.UNTOLD,)


@pytest.mark.parametrize(
    "event", [{"error": {"message": "no room"}}, {"error": {"code": 500, "message": "no room"}}]
)
def test_an_error_in_the_stream_is_one_here(event: object) -> None:
    for tokens in (vllm_server.tokens, llama_cpp.tokens):
        with pytest.raises(BenchmarkError, match="no room"):
            tokens(event, 0)


def test_a_request_says_how_long_it_is() -> None:
    head, _, content = request_bytes("/completion", {"prompt": [1]}).partition(b"\r\n\r\n")

    assert head.startswith(b"POST /completion HTTP/1.1\r\n")
    assert f"Content-Length: {len(content)}".encode() in head


def test_llama_cpp_is_told_the_scale_of_every_adapter() -> None:
    ids = {"a": 0, "b": 1}
    scales = [llama_cpp.body(ids, (1,), name, 4)["lora"] for name in (None, "b")]

    assert scales == [
        [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}],
        [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}],
    ]


def test_replies_are_in_the_order_of_the_prompts() -> None:
    async def request(index: int, got: Got) -> None:
        await asyncio.sleep(0 if index else 0.001)
        got((index,))
        got(())
        got((8, 9))

    first, second = asyncio.run(together(WAVE, request))

    assert (first.tokens, second.tokens) == ((0, 8, 9), (1, 8, 9))
    assert [arrival.num_tokens for arrival in first.timeline] == [1, 2]


def test_a_wave_whose_time_is_up_gives_what_there_is() -> None:
    ended = []

    async def request(index: int, got: Got) -> None:
        got((index,))
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(index)

    wave = Wave(WAVE.prompts, WAVE.adapters, max_tokens=2, seconds=0.01)
    replies = asyncio.run(together(wave, request))

    assert [reply.tokens for reply in replies] == [(0,), (1,)]
    assert ended == [0, 1]
