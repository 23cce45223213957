"""What the adapter store writes down of names, uploads and a blob's files, and how."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import PurePath

from loraplex.adapters.store_files import FileRecord
from loraplex.errors import InvalidRequestError, RequestError

FORMAT = 1
_ADAPTER_ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UPLOAD_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class AdapterState(Enum):
    """Whether a stored adapter can be served."""

    READY = "ready"
    QUARANTINED = "quarantined"  # its bytes on disk differ from its version
    INCOMPATIBLE = "incompatible"  # stored for another base model, or a larger --max-rank


class Visibility(StrEnum):
    """Who may name the adapter."""

    PRIVATE = "private"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name and what it stands for. Times are seconds since the epoch."""

    adapter_id: str
    version: str  # "" when the manifest cannot be read
    etag: str
    size_bytes: int  # of the safetensors file
    rank: int
    target_modules: tuple[str, ...]
    state: AdapterState
    visibility: Visibility
    create_time: float
    last_used_time: float | None
    owner: str
    base_id: str
    pinned: bool = False
    use_dora: bool = False
    invocation_tokens: tuple[int, ...] = ()  # of an activated LoRA; else none


def require_ready(record: AdapterRecord) -> None:
    """ADAPTER_UNUSABLE unless the adapter can be served; the message tells the way out."""
    if record.state is not AdapterState.READY:
        raise RequestError("ADAPTER_UNUSABLE", f"{record.adapter_id} is {_trouble(record)}")


def _trouble(record: AdapterRecord) -> str:
    if record.state is AdapterState.INCOMPATIBLE:
        return "incompatible: it was uploaded for another base model"
    if not record.version:
        return "quarantined: its record cannot be read; delete it, or upload it with replace"
    return (
        "quarantined: its bytes on disk differ from what was uploaded; the same upload again"
        " repairs it"
    )


def state_under(record: AdapterRecord, max_rank: int) -> AdapterState:
    """The record's state on a server that refuses by `require_rank`."""
    is_too_large = record.state is AdapterState.READY and record.rank > max_rank
    return AdapterState.INCOMPATIBLE if is_too_large else record.state


def require_rank(record: AdapterRecord, max_rank: int) -> None:
    """ADAPTER_UNUSABLE for what came when the server had a larger --max-rank."""
    if record.rank > max_rank:
        raise RequestError(
            "ADAPTER_UNUSABLE",
            f"{record.adapter_id} has rank {record.rank}, which is over this server's {max_rank}"
            " (--max-rank)",
        )


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """What an upload's header asks for."""

    adapter_id: str
    upload_id: str  # a UUID, lower case
    total_size: int  # bytes of the safetensors file
    sha256: str  # of it, lower case
    config_json: str  # as uploaded
    resume_offset: int = 0  # 0 with no partial: a new upload
    replace: bool = False
    if_match_etag: str = ""  # implies replace


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How far an upload came."""

    committed_size: int  # bytes that are safely on disk
    expire_time: float  # seconds since the epoch
    record: AdapterRecord | None  # once published: what the name has now of it


@dataclass(frozen=True, slots=True)
class Partial:
    """What is on disk of an upload."""

    request: UploadRequest  # its `resume_offset`, `replace` and `if_match_etag` are not kept
    committed_size: int  # bytes that are safely on disk
    time: float  # seconds since the epoch: of the last write, or of the publication
    version: str | None = None  # once published, which leaves no more than this


def is_adapter_id(name: str) -> bool:
    return _ADAPTER_ID.fullmatch(name) is not None and ".." not in name


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def is_upload_id(text: str) -> bool:
    return _UPLOAD_ID.fullmatch(text) is not None


def validate_adapter_id(name: str, field: str = "adapter_id") -> None:
    """InvalidRequestError unless `name` may name an adapter; `field` is where the name stood."""
    if not is_adapter_id(name):
        raise InvalidRequestError(
            field,
            "must be 1 to 63 of a-z, 0-9, '.', '_' and '-', begin and end with a letter or digit,"
            " and not hold '..'",
        )


def manifest_bytes(record: AdapterRecord) -> bytes:
    fields = {
        "format": FORMAT,
        "adapter_id": record.adapter_id,
        "version": record.version,
        "etag": record.etag,
        "size_bytes": record.size_bytes,
        "rank": record.rank,
        "target_modules": record.target_modules,
        "visibility": record.visibility.value,
        "create_time": record.create_time,
        "last_used_time": record.last_used_time,
        "owner": record.owner,
        "base_id": record.base_id,
        "pinned": record.pinned,
        "use_dora": record.use_dora,
        "invocation_tokens": record.invocation_tokens,
    }
    return json.dumps(fields, indent=2).encode()


def parse_manifest(data: bytes, adapter_id: str) -> AdapterRecord | None:
    """None when it is not a whole manifest of this name."""
    try:
        fields = json.loads(data)
        last_used = fields["last_used_time"]
        record = AdapterRecord(
            adapter_id=fields["adapter_id"],
            version=fields["version"],
            etag=str(fields["etag"]),
            size_bytes=int(fields["size_bytes"]),
            rank=int(fields["rank"]),
            target_modules=tuple(str(module) for module in fields["target_modules"]),
            state=AdapterState.READY,
            visibility=Visibility(fields["visibility"]),
            create_time=float(fields["create_time"]),
            last_used_time=None if last_used is None else float(last_used),
            owner=str(fields["owner"]),
            base_id=str(fields["base_id"]),
            # Absent in what the first version wrote.
            pinned=bool(fields.get("pinned", False)),
            use_dora=bool(fields.get("use_dora", False)),
            invocation_tokens=tuple(int(token) for token in fields.get("invocation_tokens", ())),
        )
        whole = fields["format"] == FORMAT and record.adapter_id == adapter_id
        return record if whole and is_digest(record.version) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def partial_bytes(partial: Partial) -> bytes:
    request = partial.request
    fields = {
        "format": FORMAT,
        "adapter_id": request.adapter_id,
        "upload_id": request.upload_id,
        "total_size": request.total_size,
        "sha256": request.sha256,
        "config_json": request.config_json,
        "committed_size": partial.committed_size,
        "time": partial.time,
        "version": partial.version,
    }
    return json.dumps(fields, indent=2).encode()


def parse_partial(data: bytes, upload_id: str) -> Partial | None:
    """None when it is not a whole note of this upload."""
    try:
        fields = json.loads(data)
        request = UploadRequest(
            adapter_id=fields["adapter_id"],
            upload_id=fields["upload_id"],
            total_size=int(fields["total_size"]),
            sha256=str(fields["sha256"]),
            config_json=str(fields["config_json"]),
        )
        version = fields["version"]
        whole = (
            fields["format"] == FORMAT
            and request.upload_id == upload_id
            and is_adapter_id(request.adapter_id)
            and (version is None or is_digest(version))
        )
        partial = Partial(request, int(fields["committed_size"]), float(fields["time"]), version)
        return partial if whole else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def last_used_bytes(times: Mapping[str, float]) -> bytes:
    return json.dumps({"format": FORMAT, "last_used_time": times}, indent=2).encode()


def parse_last_used(data: bytes) -> dict[str, float]:
    """By adapter_id; empty when it cannot be read."""
    try:
        fields = json.loads(data)
        times = {str(name): float(time) for name, time in fields["last_used_time"].items()}
        return times if fields["format"] == FORMAT else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def unreadable_record(adapter_id: str) -> AdapterRecord:
    """Stands for a manifest that cannot be read, so that its name is seen and can be deleted."""
    return AdapterRecord(
        adapter_id=adapter_id,
        version="",
        etag="",
        size_bytes=0,
        rank=0,
        target_modules=(),
        state=AdapterState.QUARANTINED,
        visibility=Visibility.PRIVATE,
        create_time=0.0,
        last_used_time=None,
        owner="",
        base_id="",
    )


def files_bytes(files: Mapping[str, FileRecord]) -> bytes:
    entries = {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()}
    return json.dumps({"format": FORMAT, "files": entries}, indent=2, sort_keys=True).encode()


def parse_files(data: bytes) -> dict[str, FileRecord] | None:
    """None when it is not a whole record of a blob's files."""
    try:
        fields = json.loads(data)
        entries = fields["files"].items()
        files = {name: FileRecord(int(e["size"]), str(e["sha256"])) for name, e in entries}
        whole = fields["format"] == FORMAT and all(PurePath(name).name == name for name in files)
        return files if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
