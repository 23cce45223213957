"""Adapters over the wire: what is acknowledged is there, what is not has never been."""

import hashlib
import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from loraplex.model.config import ModelConfig
from loraplex_client import (
    Aborted,
    AdapterState,
    AlreadyExists,
    Client,
    Completion,
    Delta,
    Event,
    FailedPrecondition,
    Finished,
    FinishReason,
    InvalidArgument,
    NotFound,
    Residency,
    Started,
    UploadState,
)
from loraplex_client.upload import prepare
from loraplex_client.wire import GenerateOptions
from safetensors.numpy import load_file, save_file

from tests.e2e.servers import partials, slow_upload

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker
    from tests.e2e.servers import ServerProcess

MODULES = ("o_proj", "q_proj")
PROMPT = "The capital of France is"
GREEDY: GenerateOptions = {"max_tokens": 24, "ignore_eos": True, "temperature": 0.0}


def names(client: Client) -> list[str]:
    return [adapter.adapter_id for adapter in client.list_adapters()]


def test_an_adapter_from_upload_to_delete(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder = make_adapter(default_config, 4, MODULES)
    sent: list[tuple[int, int]] = []
    result = client.upload_adapter("acme", folder, progress=lambda *at: sent.append(at))
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert result.created
    assert (sent[0], sent[-1]) == ((0, size), (size, size))
    adapter = result.adapter
    assert (adapter.adapter_id, adapter.rank, adapter.size_bytes) == ("acme", 4, size)
    assert sorted(adapter.target_modules) == sorted(MODULES)
    assert (adapter.state, adapter.residency) == (AdapterState.READY, Residency.DISK)
    assert client.get_adapter("acme") == adapter
    assert adapter in list(client.list_adapters(page_size=1))

    again = client.upload_adapter("acme", folder)
    assert (again.created, again.adapter) == (False, adapter)
    other = make_adapter(default_config, 4, MODULES)
    with pytest.raises(AlreadyExists) as refused:
        client.upload_adapter("acme", other)
    assert refused.value.reason == "ADAPTER_EXISTS"
    with pytest.raises(FailedPrecondition) as pinned:
        client.complete(PROMPT, "acme", adapter_version="0" * 64, max_tokens=1)
    assert pinned.value.reason == "VERSION_MISMATCH"
    assert client.complete(PROMPT, "acme", adapter_version=adapter.version, max_tokens=1)
    twin = client.upload_adapter("acme-twin", folder)
    assert (twin.created, twin.adapter.version) == (True, adapter.version)

    base = client.complete(PROMPT, max_tokens=8, temperature=0.0)
    changed = client.complete(PROMPT, "acme", max_tokens=8, temperature=0.0)
    assert changed.token_ids != base.token_ids
    used = client.get_adapter("acme")
    assert used.references == 0
    assert used.residency is Residency.DEVICE
    assert used.last_used_time is not None

    blob = server.store / "blobs/sha256" / adapter.version[:2] / adapter.version
    stored = (blob / "adapter_model.safetensors").read_bytes()
    assert stored == (folder / "adapter_model.safetensors").read_bytes()
    client.delete_adapter("acme")
    for call in (client.get_adapter, client.delete_adapter):
        with pytest.raises(NotFound) as gone:
            call("acme")
        assert gone.value.reason == "ADAPTER_NOT_FOUND"
    assert blob.is_dir()
    client.delete_adapter("acme-twin")
    assert not blob.exists()
    assert not {"acme", "acme-twin"} & set(names(client))


def test_a_pinned_adapter_is_there_before_anybody_asks(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    for replace in (False, True):
        client.upload_adapter("keeper", make_adapter(default_config), replace=replace)
        if not replace:
            assert client.pin_adapter("keeper").pinned
        server.eventually(lambda: client.get_adapter("keeper").residency is Residency.DEVICE)
        assert client.get_adapter("keeper").pinned
    assert not client.pin_adapter("keeper", pinned=False).pinned
    client.delete_adapter("keeper")


def test_replacing_and_deleting_an_adapter_in_use(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    """Who has begun goes on with the version it began with; who comes next gets the new one."""
    folders = [make_adapter(default_config) for _ in range(3)]
    streams: list[Generator[Event, None, None]] = []
    versions: list[str] = []
    long: GenerateOptions = {**GREEDY, "max_tokens": 192}  # the first outlasts two uploads

    def begin() -> Started:
        streams.append(client.stream(PROMPT, "busy", **long))
        started = next(streams[-1])
        assert isinstance(started, Started)
        assert [used.version for used in started.adapters] == [versions[-1]]
        assert isinstance(next(streams[-1]), Delta)  # it runs
        return started

    versions.append(client.upload_adapter("busy", folders[0]).adapter.version)
    first = begin()
    versions.append(client.upload_adapter("busy", folders[1], replace=True).adapter.version)
    begin()
    client.delete_adapter("busy")
    assert "busy" not in names(client)
    with pytest.raises(NotFound):
        client.complete(PROMPT, "busy", max_tokens=1)
    versions.append(client.upload_adapter("busy", folders[2]).adapter.version)
    begin()
    assert client.get_adapter("busy").references == 1
    ends = [list(stream)[-1] for stream in streams]
    assert all(isinstance(e, Finished) and e.finish_reason is FinishReason.LENGTH for e in ends)
    digests = {r.digest for s in server.steps_of(first.request_id) for r in s.rows}
    assert set(versions) <= digests  # in the same passes
    blobs = server.store / "blobs/sha256"
    for version in versions[:2]:
        server.eventually(lambda v=version: not list(blobs.glob(f"??/{v}")))  # type: ignore[misc]
    client.delete_adapter("busy")


def test_of_writers_who_read_the_same_etag_one_wins(
    client: Client, make_adapter: "AdapterMaker", default_config: ModelConfig
) -> None:
    etag = client.upload_adapter("raced", make_adapter(default_config)).adapter.etag
    folders = [make_adapter(default_config) for _ in range(4)]

    def write(folder: Path) -> str | None:
        """The new etag, or why there is none."""
        try:
            return client.upload_adapter("raced", folder, if_match_etag=etag).adapter.etag
        except Aborted as error:
            return error.reason

    with ThreadPoolExecutor(len(folders)) as pool:
        ended = set(pool.map(write, folders))
    (winner,) = ended - {"ETAG_MISMATCH", "UPLOAD_IN_PROGRESS"}
    assert client.get_adapter("raced").etag == winner != etag
    another = make_adapter(default_config)
    with pytest.raises(Aborted) as late:
        client.upload_adapter("raced", another, if_match_etag=etag, replace=True)
    assert late.value.reason == "ETAG_MISMATCH"
    client.delete_adapter("raced")


def test_a_blend_is_the_weighted_sum_of_its_members(
    exact_server: "ServerProcess", make_adapter: "AdapterMaker", default_config: ModelConfig
) -> None:
    folders = {name: make_adapter(default_config, 4, MODULES) for name in ("one", "two")}
    weights = {"one": 0.7, "two": -0.4}
    whole = make_adapter(default_config, 8, MODULES)
    parts = [load_file(folders[name] / "adapter_model.safetensors") for name in weights]
    tensors = {
        key: np.concatenate([parts[0][key], parts[1][key]])
        if "lora_A" in key
        else np.concatenate([w * p[key] for w, p in zip(weights.values(), parts, strict=True)], 1)
        for key in parts[0]
    }
    save_file(tensors, whole / "adapter_model.safetensors")
    with exact_server.client() as client:
        for name, folder in {**folders, "whole": whole}.items():
            client.upload_adapter(f"b-{name}", folder)

        def ask(adapter_id: str = "", **blend: float) -> Completion:
            members = {f"b-{name}": weight for name, weight in blend.items()} or None
            return client.complete(PROMPT, adapter_id, blend=members, max_tokens=8, temperature=0)

        blended = ask("", **weights)
        assert [used.adapter_id for used in blended.adapters] == ["b-one", "b-two"]
        assert blended.token_ids == ask("b-whole").token_ids
        assert ask(one=1, two=0).token_ids == ask("b-one").token_ids != blended.token_ids
        for name in ("b-one", "b-two", "b-whole"):
            client.delete_adapter(name)
        exact_server.eventually(exact_server.is_idle)


def test_an_activated_lora_acts_from_its_invocation_on(
    exact_server: "ServerProcess", make_adapter: "AdapterMaker", default_config: ModelConfig
) -> None:
    folder = make_adapter(default_config, 4, MODULES)
    invocation, text = [11, 12], [500, 501, 502]
    with exact_server.client() as client:
        client.upload_adapter("always", folder)
        config = folder / "adapter_config.json"
        fields = {**json.loads(config.read_text()), "alora_invocation_tokens": invocation}
        config.write_text(json.dumps(fields))
        client.upload_adapter("invoked", folder)

        def ask(adapter_id: str, *prompt: list[int]) -> tuple[int, ...]:
            token_ids = [token for part in prompt for token in part]
            answer = client.complete(
                None, adapter_id, token_ids=token_ids, max_tokens=6, temperature=0
            )
            assert [used.adapter_id for used in answer.adapters] == [adapter_id] * bool(adapter_id)
            return answer.token_ids

        assert ask("invoked", text) == ask("", text) != ask("always", text)
        assert ask("invoked", invocation, text) == ask("always", invocation, text)
        late = ask("invoked", text, invocation)
        assert late not in (ask("", text, invocation), ask("always", text, invocation))
        for name in ("always", "invoked"):
            client.delete_adapter(name)
        exact_server.eventually(exact_server.is_idle)


def test_a_refused_adapter_leaves_nothing(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder = make_adapter(default_config)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))
    with pytest.raises(InvalidArgument, match="bias") as refused:
        client.upload_adapter("biased", folder)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert "biased" not in names(client)
    assert partials(server.store) == []


@pytest.mark.parametrize("share", [0.4, 1.0], ids=["half of it", "all but the finish"])
def test_a_client_that_is_killed_in_mid_upload_publishes_nothing(
    share: float,
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    """And what it sent need not be sent again."""
    folder = make_adapter(default_config, 2)
    weights = (folder / "adapter_model.safetensors").read_bytes()

    def num_given_up() -> float:
        """Whether gRPC tells of a death as of an end of the stream or as of a cancel is chance."""
        codes = ("Aborted", "Canceled")
        return sum(server.metric("adapter_uploads_total", code=code) for code in codes)

    before, num_sent = num_given_up(), int(len(weights) * share)
    with slow_upload(server, "victim", folder, num_sent) as process:
        assert "victim" not in names(client)
        process.kill()
        server.eventually(lambda: num_given_up() == before + 1)
    assert "victim" not in names(client)
    with pytest.raises(NotFound):
        client.get_adapter("victim")
    assert not (server.store / "manifests/default/victim.json").exists()
    digest = hashlib.sha256(weights).hexdigest()
    records = (server.store / "blobs/sha256").glob("??/*/record.json")
    assert not any(digest in path.read_text() for path in records)

    status = client.get_upload(prepare("victim", folder, False).header.upload_id)
    assert (status.state, status.committed_size) == (UploadState.ACTIVE, num_sent)
    begun: list[int] = []
    assert client.upload_adapter("victim", folder, progress=lambda at, _: begun.append(at)).created
    assert num_sent in begun
    assert client.complete(PROMPT, "victim", max_tokens=1).adapters[0].adapter_id == "victim"
    client.delete_adapter("victim")


def test_one_upload_to_a_name_at_a_time(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder, other = make_adapter(default_config, 2), make_adapter(default_config, 2)
    with slow_upload(server, "contended", folder, 70_000):
        with pytest.raises(Aborted, match="another upload to contended") as refused:
            client.upload_adapter("contended", other)
        assert refused.value.reason == "UPLOAD_IN_PROGRESS"
        # The same folder is the same upload, which goes on here.
        assert client.upload_adapter("contended", folder).created
        assert server.metric("adapter_uploads_total", code="OutOfRange") > 0
    client.delete_adapter("contended")
