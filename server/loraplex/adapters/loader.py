"""Adapters from the store to packed form, off the engine thread."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from loraplex_kernels.tables import GRANULE_RANK
from safetensors import SafetensorError

from loraplex.adapters.packing import Layout, PackedAdapter, open_packed, pack, save_packed
from loraplex.adapters.peft import (
    CONFIG_NAME,
    AdapterSpec,
    BaseLinear,
    read_adapter,
    read_config,
)
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_files import storage_errors
from loraplex.errors import RequestError

log = logging.getLogger(__name__)


class Blobs(Protocol):
    """The store, as far as the loader needs it."""

    def verify(self, version: str) -> None:
        """Re-hash the blob once in this process; RequestError ADAPTER_UNUSABLE when it differs."""

    def blob(self, version: str) -> Path:
        """The folder of the uploaded safetensors file and config."""

    @property
    def temporary(self) -> Path:
        """A folder on the same file system."""

    def add_file(self, version: str, name: str, source: Path) -> None:
        """Move a finished cache file into the blob, hashed with the rest."""


class AdapterLoader:
    """Reads and copies adapters on a few worker threads of its own."""

    def __init__(
        self, blobs: Blobs, linears: Mapping[str, BaseLinear], layout: Layout, max_rank: int
    ) -> None:
        self._blobs = blobs
        self._linears = linears
        self._layout = layout
        self._max_rank = max_rank
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="loraplex-loader")

    def read(self, digest: str) -> "Future[PackedAdapter]":
        """The packed adapter, its weights mapped; packed anew when the cache file is absent."""
        return self._workers.submit(self._read, digest)

    def run(self, work: Callable[[], None]) -> "Future[None]":
        return self._workers.submit(work)

    def pack_upload(self, weights: Path, spec: AdapterSpec) -> dict[str, Path]:
        """The cache file of an adapter about to be published, beside its weights, by name."""
        path = weights.with_name(self._cache_name)
        save_packed(pack(weights, spec, self._layout), path)
        return {self._cache_name: path}

    def close(self) -> None:
        self._workers.shutdown()

    def _read(self, digest: str) -> PackedAdapter:
        self._blobs.verify(digest)
        folder = self._blobs.blob(digest)
        path = folder / self._cache_name
        try:
            if path.exists():
                packed = open_packed(path)
                # Kept by a server with a larger --max-rank: to be refused, below.
                if packed.num_parts <= -(-self._max_rank // GRANULE_RANK):
                    return packed
        except (SafetensorError, OSError) as error:
            log.warning("packing adapter %s again: %s", digest[:12], error)
        with storage_errors():
            config_json = (folder / CONFIG_NAME).read_text(encoding="utf-8")
            config = read_config(config_json, self._max_rank)
            spec = read_adapter(folder / WEIGHTS_NAME, config, self._linears, self._max_rank)
        return self._pack(digest, spec)

    def _pack(self, version: str, spec: AdapterSpec) -> PackedAdapter:
        packed = pack(self._blobs.blob(version) / WEIGHTS_NAME, spec, self._layout)
        try:
            with tempfile.TemporaryDirectory(dir=self._blobs.temporary) as work:
                fresh = Path(work) / self._cache_name
                save_packed(packed, fresh)
                self._blobs.add_file(version, self._cache_name, fresh)
        except (OSError, SafetensorError, RequestError) as error:
            log.warning("adapter %s is not kept packed: %s", version[:12], error)
        return packed

    @property
    def _cache_name(self) -> str:
        return f"packed-{self._layout.fingerprint}.safetensors"
