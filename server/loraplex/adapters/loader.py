"""Adapters from the store to packed form, off the engine thread."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from loraplex.adapters.packing import Layout, PackedAdapter, open_packed, pack, save_packed
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config

log = logging.getLogger(__name__)


class Blobs(Protocol):
    """The store, as far as the loader needs it."""

    def verify(self, version: str) -> None:
        """Re-hash the blob once in this process; RequestError ADAPTER_UNUSABLE when it differs."""

    def blob(self, version: str) -> Path:
        """The folder of the uploaded safetensors file and config."""


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

    def pack(self, version: str, spec: AdapterSpec) -> None:
        """Write the cache file of a version just published, so that its first use need not."""
        folder = self._blobs.blob(version)
        save_packed(self._pack(folder, spec), self._cache_file(folder))

    def close(self) -> None:
        self._workers.shutdown()

    def _read(self, digest: str) -> PackedAdapter:
        self._blobs.verify(digest)
        folder = self._blobs.blob(digest)
        path = self._cache_file(folder)
        try:
            if path.exists():
                return open_packed(path)
        except (SafetensorError, OSError) as error:
            log.warning("packing adapter %s again: %s", digest[:12], error)
        config_json = (folder / "adapter_config.json").read_text(encoding="utf-8")
        config = read_config(config_json, self._max_rank)
        weights = folder / "adapter_model.safetensors"
        packed = self._pack(folder, read_adapter(weights, config, self._linears, self._max_rank))
        save_packed(packed, path)
        return packed

    def _pack(self, folder: Path, spec: AdapterSpec) -> PackedAdapter:
        return pack(folder / "adapter_model.safetensors", spec, self._layout)

    def _cache_file(self, folder: Path) -> Path:
        return folder / f"packed-{self._layout.fingerprint}.safetensors"
