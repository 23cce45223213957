"""What is asked of a server."""

from dataclasses import replace

from lengths import Fixed, Uniform
from popularity import Popularity
from trace_file import TraceLine
from workload import Prefix, PrefixScope, Request, Traffic, as_trace, replayed

TRAFFIC = Traffic(
    num_requests=40,
    adapters=("a", "b", "c"),
    popularity=Popularity("uniform"),
    prompt=Uniform(4, 9),
    output=Fixed(5),
    prefix=Prefix(),
    rate=10.0,
    burstiness=1.0,
    vocab_size=1000,
    seed=1,
)


def test_requests_have_the_asked_sizes() -> None:
    requests = TRAFFIC.requests("run 1")

    assert len(requests) == 40
    assert {request.adapter for request in requests} == {"a", "b", "c"}
    assert {len(request.token_ids) for request in requests} == {4, 5, 6, 7, 8, 9}
    assert {request.max_tokens for request in requests} == {5}
    assert all(0 <= token < 1000 for request in requests for token in request.token_ids)
    assert requests[-1].at == 4.0
    assert {each.adapter for each in replace(TRAFFIC, adapters=()).requests("run 1")} == {None}


def test_the_seed_decides_and_runs_differ_in_their_prompts_alone() -> None:
    def shape(requests: list[Request]) -> list[tuple[object, ...]]:
        return [(each.at, each.adapter, len(each.token_ids)) for each in requests]

    first, second = TRAFFIC.requests("run 1"), TRAFFIC.requests("run 2")

    assert first == TRAFFIC.requests("run 1")
    assert shape(first) == shape(second) != shape(replace(TRAFFIC, seed=2).requests("run 1"))
    prompts = {each.token_ids for each in (*first, *second)}
    assert len(prompts) == 80


def test_one_option_leaves_what_others_draw() -> None:
    plain = TRAFFIC.requests("run 1")
    longer = replace(TRAFFIC, output=Uniform(1, 99), burstiness=0.5).requests("run 1")

    assert [each.token_ids for each in longer] == [each.token_ids for each in plain]
    assert [each.adapter for each in longer] == [each.adapter for each in plain]


def test_shared_prefixes() -> None:
    def prefixes(scope: PrefixScope, part: str = "run 1") -> set[tuple[object, ...]]:
        traffic = replace(TRAFFIC, prefix=Prefix(16, scope), prompt=Fixed(4))
        requests = traffic.requests(part)
        assert {len(each.token_ids) for each in requests} == {20}
        assert len({each.token_ids for each in requests}) == 40
        return {(each.adapter, each.token_ids[:16]) for each in requests}

    by_adapter, by_all = prefixes(PrefixScope.ADAPTER), prefixes(PrefixScope.ALL)
    assert len(by_adapter) == len({tokens for _, tokens in by_adapter}) == 3
    assert len({tokens for _, tokens in by_all}) == 1
    assert not by_all & prefixes(PrefixScope.ALL, "run 2")


def test_a_trace_is_the_workload_again() -> None:
    requests = TRAFFIC.requests("run 1")

    again = replayed(as_trace(requests), 1.0, vocab_size=1000, seed=9, part="run 1")

    start = requests[0].at
    assert again == [request._replace(at=request.at - start) for request in requests]


def test_a_trace_may_be_faster_and_leave_prompts_to_the_seed() -> None:
    lines = [TraceLine(100.0, None, 3, prompt_tokens=8), TraceLine(101.0, "a", 4, token_ids=(7,))]

    first, second = (replayed(lines, 2.0, 1000, 1, part) for part in ("run 1", "run 2"))

    assert [(each.at, each.adapter, each.max_tokens) for each in first] == [
        (0.0, None, 3),
        (0.5, "a", 4),
    ]
    assert len(first[0].token_ids) == len(second[0].token_ids) == 8
    assert first[0].token_ids != second[0].token_ids
    assert first[1].token_ids == second[1].token_ids == (7,)
