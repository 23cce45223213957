"""Requests for different adapters at the same time: they share passes, and none feels it."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex.model.config import MODULES, ModelConfig
from loraplex_client import AsyncClient, Client, Completion, FinishReason, UsedAdapter

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker
    from tests.e2e.servers import ServerProcess

RANKS_AND_MODULES: Mapping[str, tuple[int, Sequence[str]]] = {
    "one": (1, ("q_proj", "v_proj")),
    "two": (2, MODULES),
    "three": (3, ("gate_proj", "up_proj")),
    "four": (4, ("down_proj",)),
    "six": (6, ("k_proj", "o_proj")),
    "eight": (8, MODULES),
    "sixteen": (16, ("q_proj", "v_proj")),
    "twenty": (20, ("o_proj",)),
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "1, 2, 3,",
    "Dear customer, thank you for your letter of the first of May, in which you",
)


@pytest.fixture(scope="module")
def folders(make_adapter: "AdapterMaker", default_config: ModelConfig) -> dict[str, Path]:
    return {
        name: make_adapter(default_config, rank, modules)
        for name, (rank, modules) in RANKS_AND_MODULES.items()
    }


def upload(client: Client, folders: Mapping[str, Path]) -> dict[str, str]:
    """The versions, by name."""
    return {
        name: client.upload_adapter(name, folder).adapter.version
        for name, folder in folders.items()
    }


def test_eight_adapters_and_the_base_share_a_pass(
    server: "ServerProcess", client: Client, folders: dict[str, Path]
) -> None:
    versions = upload(client, folders)
    names = ["", *folders]

    async def all_at_once(max_tokens: int) -> list[Completion]:
        async with AsyncClient(server.target) as client:
            return await asyncio.gather(
                *(
                    client.complete(
                        PROMPTS[0], name, max_tokens=max_tokens, temperature=0.0, ignore_eos=True
                    )
                    for name in names
                )
            )

    asyncio.run(all_at_once(1))  # nobody is through before the last adapter is read
    completions = asyncio.run(all_at_once(32))
    for name, completion in zip(names, completions, strict=True):
        used = (UsedAdapter(name, versions[name]),) if name else ()
        assert completion.adapters == used
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.usage.completion_tokens == len(completion.token_ids) == 32
    assert len({completion.token_ids for completion in completions}) == len(names)

    widest = max(server.steps(), key=lambda step: len(step.decoded_digests))
    assert widest.decoded_digests == {None, *versions.values()}
    assert {row.request_id for row in widest.rows} == {c.request_id for c in completions}


def test_a_mixed_stream_says_what_it_says_alone(
    exact_server: "ServerProcess", folders: dict[str, Path]
) -> None:
    names = ["", *folders]
    with exact_server.client() as client:
        versions = upload(client, folders)

        def ask(index: int) -> Completion:
            prompt = PROMPTS[index % len(PROMPTS)]
            return client.complete(
                prompt, names[index], max_tokens=8, temperature=0.0, ignore_eos=True
            )

        alone = [ask(index) for index in range(len(names))]
        with ThreadPoolExecutor(len(names)) as pool:
            together = list(pool.map(ask, range(len(names))))

    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.text for c in together] == [c.text for c in alone]
    ours = {completion.request_id for completion in together}
    shared = [s for s in exact_server.steps() if ours >= {row.request_id for row in s.rows}]
    assert max(len(s.decoded_digests & set(versions.values())) for s in shared) == 8


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(
    exact_server: "ServerProcess", folders: dict[str, Path]
) -> None:
    with exact_server.client() as client:
        upload(client, folders)

        def draw(request: tuple[str, int]) -> tuple[int, ...]:
            name, seed = request
            return client.complete(
                PROMPTS[1], name, max_tokens=8, temperature=1.2, top_p=0.95, seed=seed
            ).token_ids

        wanted = [("", 7), ("eight", 7), ("eight", 8)]
        alone = [draw(request) for request in wanted]
        crowd = [(name, seed) for seed, name in enumerate(folders)]
        with ThreadPoolExecutor(len(wanted) + len(crowd)) as pool:
            together = list(pool.map(draw, [*wanted, *crowd]))

    assert together[: len(wanted)] == alone
    assert len(set(alone)) == len(wanted)
