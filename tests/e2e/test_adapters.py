"""Adapters over the wire: what is acknowledged is there, what is not has never been."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from loraplex.model.config import ModelConfig
from loraplex_client import (
    AdapterState,
    AlreadyExists,
    Client,
    Delta,
    Finished,
    FinishReason,
    InvalidArgument,
    NotFound,
    Residency,
    Started,
)

if TYPE_CHECKING:
    from tests.e2e.conftest import AdapterMaker, ServerProcess

MODULES = ("o_proj", "q_proj")
PROMPT = "The capital of France is"


def names(client: Client) -> list[str]:
    return [adapter.adapter_id for adapter in client.list_adapters()]


def leftovers(server: "ServerProcess") -> list[Path]:
    return list((server.store / "uploads/default").iterdir())


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
    twin = client.upload_adapter("acme-twin", folder)
    assert (twin.created, twin.adapter.version) == (True, adapter.version)

    base = client.complete(PROMPT, max_tokens=8, temperature=0.0)
    changed = client.complete(PROMPT, "acme", max_tokens=8, temperature=0.0)
    assert changed.token_ids != base.token_ids
    used = client.get_adapter("acme")
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


def test_deleting_an_adapter_in_use(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    old = client.upload_adapter("shortlived", make_adapter(default_config)).adapter
    with closing(
        client.stream(PROMPT, "shortlived", max_tokens=40, ignore_eos=True, temperature=0.0)
    ) as events:
        started, first = next(events), next(events)
        client.delete_adapter("shortlived")
        assert "shortlived" not in names(client)
        with pytest.raises(NotFound):
            client.complete(PROMPT, "shortlived", max_tokens=1)
        new = client.upload_adapter("shortlived", make_adapter(default_config)).adapter
        assert new.version != old.version
        fresh = client.complete(PROMPT, "shortlived", max_tokens=4, temperature=0.0)
        rest = list(events)
    assert isinstance(started, Started)
    assert [used.version for used in started.adapters] == [old.version]
    assert [used.version for used in fresh.adapters] == [new.version]
    assert isinstance(rest[-1], Finished)
    assert rest[-1].finish_reason is FinishReason.LENGTH
    tokens = [t for event in (first, *rest) if isinstance(event, Delta) for t in event.token_ids]
    assert len(tokens) == 40
    digests = {r.digest for s in server.steps_of(started.request_id) for r in s.rows}
    assert {old.version, new.version} <= digests
    blobs = server.store / "blobs/sha256"
    server.eventually(lambda: not list(blobs.glob(f"??/{old.version}")))
    client.delete_adapter("shortlived")


def test_a_refused_adapter_leaves_nothing(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder = make_adapter(default_config)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(InvalidArgument, match="use_dora") as refused:
        client.upload_adapter("dora", folder)
    assert refused.value.reason == "ADAPTER_INVALID"
    assert "dora" not in names(client)
    assert leftovers(server) == []


SLOW_UPLOAD = """
import sys, time
import grpc
from loraplex_client.upload import prepare
from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc

target, name, folder, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def slowly():
    for request in prepare(name, folder, False).requests():
        if not request.HasField("chunk"):
            yield request
            continue
        for start in range(0, min(len(request.chunk.data), limit), 65536):
            data = request.chunk.data[start : min(start + 65536, limit)]
            yield adapters_pb2.UploadAdapterRequest(
                chunk=adapters_pb2.UploadChunk(offset=request.chunk.offset + start, data=data)
            )
            time.sleep(0.02)
        time.sleep(600)

stub = adapters_pb2_grpc.AdapterServiceStub(grpc.insecure_channel(target))
stub.UploadAdapter(slowly())
"""


@contextmanager
def slow_upload(
    server: "ServerProcess", name: str, folder: Path, num_bytes: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """A client in a process of its own, of which so many bytes have come and no more do."""

    def arrived() -> int:
        files = (server.store / "uploads/default").glob("*/adapter_model.safetensors")
        return sum(path.stat().st_size for path in files)

    command = [sys.executable, "-c", SLOW_UPLOAD, server.target, name, str(folder), str(num_bytes)]
    with subprocess.Popen(command) as process:
        try:
            server.eventually(lambda: arrived() == num_bytes)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("share", [0.4, 1.0], ids=["half of it", "all but the finish"])
def test_a_client_that_is_killed_in_mid_upload_publishes_nothing(
    share: float,
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder = make_adapter(default_config, 2)
    weights = (folder / "adapter_model.safetensors").read_bytes()

    def num_given_up() -> float:
        """Whether gRPC tells of a death as of an end of the stream or as of a cancel is chance."""
        codes = ("Aborted", "Canceled")
        return sum(server.metric("adapter_uploads_total", code=code) for code in codes)

    before = num_given_up()
    with slow_upload(server, "victim", folder, int(len(weights) * share)) as process:
        assert "victim" not in names(client)
        process.kill()
        server.eventually(lambda: leftovers(server) == [])
    server.eventually(lambda: num_given_up() == before + 1)
    assert "victim" not in names(client)
    with pytest.raises(NotFound):
        client.get_adapter("victim")
    assert not (server.store / "manifests/default/victim.json").exists()
    digest = hashlib.sha256(weights).hexdigest()
    records = (server.store / "blobs/sha256").glob("??/*/record.json")
    assert not any(digest in path.read_text() for path in records)

    assert client.upload_adapter("victim", folder).created
    assert client.complete(PROMPT, "victim", max_tokens=1).adapters[0].adapter_id == "victim"
    client.delete_adapter("victim")


def test_one_upload_to_a_name_at_a_time(
    server: "ServerProcess",
    client: Client,
    make_adapter: "AdapterMaker",
    default_config: ModelConfig,
) -> None:
    folder = make_adapter(default_config, 2)
    with (
        slow_upload(server, "contended", folder, 70_000),
        pytest.raises(Exception, match="another upload to contended") as refused,
    ):
        client.upload_adapter("contended", folder)
    assert getattr(refused.value, "reason", None) == "UPLOAD_IN_PROGRESS"
    server.eventually(lambda: leftovers(server) == [])
