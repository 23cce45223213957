"""The publisher judges, packs and stores; what it refuses leaves the upload to its caller."""

import json
from collections.abc import Iterator
from errno import EIO
from pathlib import Path
from typing import Any

import pytest
import torch
from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.packing import Layout
from loraplex.adapters.peft import AdapterSpec, BaseLinear, version_of
from loraplex.adapters.publisher import Packer, Publisher
from loraplex.adapters.store import AdapterRecord, AdapterStore
from loraplex.errors import RequestError
from safetensors.torch import save
from torch import Tensor

from tests.server.adapters.store_cases import BASE, open_store, refused, request_for

LINEAR = BaseLinear("model.layers.0.self_attn.q_proj", 0, "q_proj", 64, 64)
LINEARS = {LINEAR.name: LINEAR}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/Other"}
PREFIX = f"base_model.model.{LINEAR.name}"


class FakePacker:
    """Packs into a few bytes; `worn` is a disk that cannot be read half-way."""

    def __init__(self) -> None:
        self.worn = False

    def pack_upload(self, weights: Path, spec: AdapterSpec) -> dict[str, Path]:
        path = weights.with_name("packed")
        path.write_bytes(b"packed")
        if self.worn:
            raise OSError(EIO, "no", str(path))
        return {"packed": path}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.close()


def weights(value: float = 1.0) -> bytes:
    a, b = torch.full((4, 64), value), torch.ones(64, 4)
    content: bytes = save({f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b})
    return content


def publish(
    store: AdapterStore, packer: Packer, content: bytes, **changes: Any
) -> tuple[AdapterRecord, bool, Any]:
    """Suspended when it is refused."""
    publisher = Publisher(store, packer, LINEARS, "a-base", BASE, 64)
    config = publisher.check_config(json.dumps(CONFIG))
    upload = store.begin(request_for("alice", content, config_json=json.dumps(CONFIG), **changes))
    try:
        upload.write(upload.committed_size, content[upload.committed_size :])
        return publisher.publish(upload, config, upload.finish())
    finally:
        upload.suspend()


def test_what_was_packed_when_it_came_is_what_is_loaded(store: AdapterStore) -> None:
    def no_base(name: str) -> Tensor:
        raise AssertionError(f"a plain LoRA needs no base weight: {name}")

    layout = Layout(8192, torch.bfloat16)
    loader = AdapterLoader(store, LINEARS, layout, 64, no_base)
    content = weights()
    record, created, warnings = publish(store, loader, content)
    assert created
    assert len(warnings) == 1
    assert "base_model_name_or_path is 'some/Other'" in warnings[0]
    assert (record.rank, record.target_modules) == (4, ("q_proj",))
    folder = store.blob(record.version)
    (packed,) = folder.glob("packed-*")
    written = packed.stat().st_mtime_ns
    assert loader.read(record.version).result(timeout=10).num_blocks == 1
    assert packed.stat().st_mtime_ns == written
    assert publish(store, loader, content)[:2] == (record, False)
    loader.close()


def test_the_same_upload_again_repairs_what_changed_on_disk(store: AdapterStore) -> None:
    content = weights()
    record, _, _ = publish(store, FakePacker(), content)
    (store.blob(record.version) / "adapter_model.safetensors").write_bytes(b"worn")
    refused("ADAPTER_UNUSABLE", store.scrub, record.version, lambda num_bytes: None)
    repaired, created, warnings = publish(store, FakePacker(), content)
    assert (repaired, created) == (record, False)
    assert "alice was quarantined, and this upload repaired it" in warnings


def test_what_does_not_fit_may_be_another_models(store: AdapterStore) -> None:
    wide = save(
        {f"{PREFIX}.lora_A.weight": torch.ones(4, 96), f"{PREFIX}.lora_B.weight": torch.ones(64, 4)}
    )
    error = refused("ADAPTER_INVALID", publish, store, FakePacker(), wide)
    assert error.field == f"{PREFIX}.lora_A.weight"
    assert "has the shape [4, 96]" in error.message
    assert "trained for 'some/Other'; this server runs 'a-base'" in error.message


def test_the_version_is_of_weights_config_and_base(store: AdapterStore) -> None:
    publisher = Publisher(store, FakePacker(), LINEARS, "a-base", BASE, 64)
    record, _, _ = publish(store, FakePacker(), weights())
    request = request_for("alice", weights())
    config = publisher.check_config(json.dumps(CONFIG))
    assert record.version == version_of(request.sha256, config, BASE)
    other, _, _ = publish(store, FakePacker(), weights(2.0), replace=True)
    assert other.version != record.version
    error = refused("ADAPTER_INVALID", publisher.check_config, json.dumps(CONFIG | {"r": 65}))
    assert error.field == "r"


def test_a_refused_adapter_is_not_published(store: AdapterStore) -> None:
    error = refused("ADAPTER_INVALID", publish, store, FakePacker(), weights(float("nan")))
    assert error.field == f"{PREFIX}.lora_A.weight"
    refused("ADAPTER_INVALID", publish, store, FakePacker(), b"no safetensors")
    assert store.list(0, "") == ((), "")


def test_what_cannot_be_read_to_be_packed_is_kept(store: AdapterStore) -> None:
    packer = FakePacker()
    packer.worn = True
    content = weights()
    refused("STORE_UNAVAILABLE", publish, store, packer, content)
    packer.worn = False
    upload_id = request_for("alice", content).upload_id
    committed = store.upload_status(upload_id).committed_size
    assert committed == len(content)
    record, created, _ = publish(store, packer, content, resume_offset=committed)
    assert (created, store.get("alice")) == (True, record)
    with pytest.raises(RequestError):
        publish(store, packer, weights(2.0))
    assert store.get("alice") == record
