"""Names and the versions they stand for: one small file a name, all of them in memory."""

import contextlib
import logging
from bisect import bisect_left, bisect_right, insort
from dataclasses import replace
from pathlib import Path
from threading import Lock

from loraplex.adapters.store_blobs import BlobStore
from loraplex.adapters.store_files import Disk
from loraplex.adapters.store_records import (
    AdapterRecord,
    AdapterState,
    UploadRequest,
    is_adapter_id,
    last_used_bytes,
    manifest_bytes,
    parse_last_used,
    parse_manifest,
    require_ready,
    unreadable_record,
)
from loraplex.errors import RequestError

logger = logging.getLogger(__name__)


class NameBook:
    """What each name stands for. Readers look at memory, which says what is durable.

    `commit`, `settle` and `write_last_used` change the disk, and run when `blobs` is exclusive.
    """

    def __init__(
        self, manifests: Path, last_used: Path, blobs: BlobStore, disk: Disk, base_id: str
    ) -> None:
        self._manifests = manifests
        self._last_used = last_used
        self._blobs = blobs
        self._disk = disk
        self._base_id = base_id
        self._lock = Lock()  # guards what follows, for moments only

        self._records: dict[str, AdapterRecord] = {}  # judged anew when asked for
        self._ids: list[str] = []  # the records' keys, sorted
        self._is_used = False  # a last_used_time is newer than on disk
        # Versions that the disk may name beside what memory says; they keep their files.
        self._doubtful: dict[str, set[str]] = {}

    def load(self) -> bool:
        """Read all names and link their versions; False: some could not be read."""
        readable = [self._load(path) for path in self._manifests.glob("*.json")]
        if self._last_used.is_file():
            for adapter_id, time in parse_last_used(self._last_used.read_bytes()).items():
                record = self._records.get(adapter_id)
                if record is not None and time >= (record.last_used_time or record.create_time):
                    self._records[adapter_id] = replace(record, last_used_time=time)
        self._ids = sorted(self._records)
        return all(readable)

    def find(self, adapter_id: str) -> AdapterRecord | None:
        with self._lock:
            record = self._records.get(adapter_id)
        return self.judged(record) if record is not None else None

    def get(self, adapter_id: str) -> AdapterRecord:
        record = self.find(adapter_id)
        if record is None:
            raise _not_found(adapter_id)
        return record

    def acquire(self, adapter_id: str, time: float) -> AdapterRecord:
        """The name's record, READY, its version retained and used at `time`."""
        with self._lock:
            record = self._records.get(adapter_id)
            if record is None:
                raise _not_found(adapter_id)
            record = self.judged(record)
            require_ready(record)
            self._blobs.retain(record.version)
            record = replace(record, last_used_time=time)
            self._records[adapter_id] = record
            self._is_used = True
        return record

    def page(self, size: int, after: str) -> tuple[tuple[AdapterRecord, ...], bool]:
        """Up to `size` records by name behind `after`, and whether more follow."""
        with self._lock:
            start = bisect_right(self._ids, after)
            records = [self._records[name] for name in self._ids[start : start + size]]
            more = start + size < len(self._ids)
        return tuple(self.judged(record) for record in records), more

    def pinned(self) -> tuple[AdapterRecord, ...]:
        """Oldest first."""
        with self._lock:
            records = [record for record in self._records.values() if record.pinned]
        records.sort(key=lambda record: (record.create_time, record.adapter_id))
        return tuple(self.judged(record) for record in records)

    def judged(self, record: AdapterRecord) -> AdapterRecord:
        """The record with the state it has now."""
        state = AdapterState.READY
        if self._blobs.is_damaged(record.version):
            state = AdapterState.QUARANTINED
        elif record.base_id != self._base_id:
            state = AdapterState.INCOMPATIBLE
        return record if record.state is state else replace(record, state=state)

    def holding(self, request: UploadRequest, version: str) -> AdapterRecord | None:
        """The name's record if it has this version; None: it may get it, as the request says."""
        record = self.find(request.adapter_id)
        if record is not None and record.version == version:
            return record
        self._check_flip(request, record)
        return None

    def check_header(self, request: UploadRequest) -> None:
        """`holding`, as far as it can be told before the bytes are here."""
        record = self.find(request.adapter_id)
        if record is not None and record.base_id == self._base_id:
            sha256 = self._blobs.weights_sha256(record.version)
            if sha256 is None or sha256 == request.sha256:
                return
        self._check_flip(request, record)

    def commit(self, adapter_id: str, record: AdapterRecord | None) -> None:
        """The name stands for `record`, or for nothing: on disk, then for everybody.

        OSError: it stands for what it did. Its last use is kept, whatever `record` says.
        """
        before = self.find(adapter_id)
        doubtful = self._doubtful.setdefault(adapter_id, set())
        for one in (before, record):
            if one is not None:
                self._blobs.link(one.version, adapter_id)
                doubtful.add(one.version)
        try:
            self._write(adapter_id, record)
        except OSError:
            with contextlib.suppress(OSError):
                self._settle(adapter_id)
            raise
        self._keep(adapter_id, record)
        self._let_go(adapter_id)

    def settle(self) -> None:
        """Where a failing disk may differ from memory, make it say the same."""
        for adapter_id in list(self._doubtful):
            self._settle(adapter_id)

    def write_last_used(self) -> None:
        """When names were last used, if that has changed since it was written."""
        with self._lock:
            if not self._is_used:
                return
            self._is_used = False
            used = {name: record.last_used_time for name, record in self._records.items()}
        times = {name: time for name, time in used.items() if time is not None}
        try:
            self._blobs.write(self._last_used, last_used_bytes(times))
        except OSError:
            self._is_used = True
            raise

    def _check_flip(self, request: UploadRequest, record: AdapterRecord | None) -> None:
        if request.if_match_etag:
            if record is None or record.etag != request.if_match_etag:
                what = "does not exist" if record is None else "does not carry this etag"
                raise RequestError(
                    "ETAG_MISMATCH",
                    f"{request.adapter_id} {what}",
                    field="header.if_match_etag",
                    metadata={} if record is None else {"etag": record.etag},
                )
        elif record is not None and not request.replace:
            raise RequestError(
                "ADAPTER_EXISTS",
                f"{request.adapter_id} holds other content; set replace, or use another name",
                field="header.adapter_id",
            )

    def _settle(self, adapter_id: str) -> None:
        self._write(adapter_id, self.find(adapter_id))
        self._let_go(adapter_id)

    def _write(self, adapter_id: str, record: AdapterRecord | None) -> None:
        path = self._manifest(adapter_id)
        if record is not None:
            self._blobs.write(path, manifest_bytes(record))
        else:
            self._disk.remove(path)
            self._disk.sync(path.parent)

    def _keep(self, adapter_id: str, record: AdapterRecord | None) -> None:
        with self._lock:
            before = self._records.get(adapter_id)
            if record is None:
                if self._records.pop(adapter_id, None) is not None:
                    del self._ids[bisect_left(self._ids, adapter_id)]
                return
            if before is None:
                insort(self._ids, adapter_id)
            used = before.last_used_time if before is not None else record.last_used_time
            self._records[adapter_id] = replace(record, last_used_time=used)

    def _let_go(self, adapter_id: str) -> None:
        """The disk says what memory does: only that version has the name."""
        record = self.find(adapter_id)
        for version in self._doubtful.pop(adapter_id, ()):
            if record is None or record.version != version:
                self._blobs.unlink(version, adapter_id)

    def _load(self, path: Path) -> bool:
        adapter_id = path.name.removesuffix(".json")
        if not is_adapter_id(adapter_id):
            logger.error("adapter store: %s is not a manifest of this server's", path)
            return False
        try:
            record = parse_manifest(path.read_bytes(), adapter_id)
        except OSError as error:
            logger.error("adapter store: %s", error)
            record = None
        if record is None:
            logger.error("adapter store: the manifest %s cannot be read", path)
            self._records[adapter_id] = unreadable_record(adapter_id)
            return False
        self._blobs.load(record.version, adapter_id)
        self._records[adapter_id] = record
        return True

    def _manifest(self, adapter_id: str) -> Path:
        return self._manifests / f"{adapter_id}.json"


def _not_found(adapter_id: str) -> RequestError:
    return RequestError("ADAPTER_NOT_FOUND", f"there is no adapter {adapter_id!r}")
