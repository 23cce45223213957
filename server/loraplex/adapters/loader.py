"""Adapters from the store to packed form, off the engine thread."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from loraplex_kernels.granules import GRANULE_RANK
from safetensors import SafetensorError

from loraplex.adapters.packing import (
    BaseWeights,
    Layout,
    PackedAdapter,
    open_packed,
    pack,
    save_packed,
)
from loraplex.adapters.peft import (
    CONFIG_NAME,
    AdapterSpec,
    BaseLinear,
    read_adapter,
    read_config,
)
from loraplex.adapters.safetensors_header import WEIGHTS_NAME
from loraplex.adapters.store_files import storage_errors
from loraplex.errors import AdapterInvalidError, RequestError
from loraplex.priority import give_way

log = logging.getLogger(__name__)


class Blobs(Protocol):
    """The store, as far as the loader needs it."""

    def verify(self, version: str) -> None:
        """Re-hash the blob once in this process; RequestError ADAPTER_UNUSABLE when it differs."""

    def blob(self, version: str) -> Path:
        """The folder of the uploaded safetensors file and config."""

    def cache(self, version: str, name: str) -> Path | None:
        """A file that was added, unless it was found to differ since."""

    @property
    def temporary(self) -> Path:
        """A folder on the same file system."""

    def add_file(self, version: str, name: str, source: Path) -> None:
        """Move a finished cache file into the blob, hashed with the rest."""


def as_is(packed: PackedAdapter) -> PackedAdapter:
    return packed


class AdapterLoader:
    """Reads and copies adapters on a few worker threads of its own, which give way to the steps."""

    def __init__(
        self,
        blobs: Blobs,
        linears: Mapping[str, BaseLinear],
        layout: Layout,
        max_rank: int,
        base_weights: BaseWeights,
        hold: Callable[[PackedAdapter], PackedAdapter] = as_is,
    ) -> None:
        """`hold`: brings what was read into the memory that it is to be kept in."""
        self._blobs = blobs
        self._linears = linears
        self._layout = layout
        self._max_rank = max_rank
        self._base_weights = base_weights
        self._hold = hold
        # Three kinds, so that no copy stands behind a slow disk, and nobody who waits for an
        # adapter behind uploads.
        self._readers = ThreadPoolExecutor(2, "loraplex-loader-read", _step_back)
        self._copiers = ThreadPoolExecutor(2, "loraplex-loader-copy", _step_back)
        self._packer = ThreadPoolExecutor(1, "loraplex-loader-pack", _step_back)

    def read(self, digest: str) -> "Future[PackedAdapter]":
        """The packed adapter, its weights mapped; packed anew without a sound cache file.

        ADAPTER_UNUSABLE: what is stored cannot be served by this server.
        """
        return self._readers.submit(lambda: self._hold(self._read(digest)))

    def run(self, work: Callable[[], None]) -> "Future[None]":
        return self._copiers.submit(work)

    def pack_upload(self, weights: Path, spec: AdapterSpec) -> dict[str, Path]:
        """The cache file of an adapter about to be published, beside its weights, by name.

        Empty if it cannot be written: then the first read packs the adapter. One after the other:
        each holds a packed adapter in memory.
        """
        path = weights.with_name(self._cache_name)

        def work() -> dict[str, Path]:
            packed = pack(weights, spec, self._layout, self._base_weights)
            try:
                save_packed(packed, path)
            except OSError as error:
                log.warning("an upload is not kept packed: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)  # what came may need the room
                return {}
            return {self._cache_name: path}

        return self._packer.submit(work).result()

    def close(self) -> None:
        for workers in (self._readers, self._copiers, self._packer):
            workers.shutdown()

    def _read(self, digest: str) -> PackedAdapter:
        self._blobs.verify(digest)
        path = self._blobs.cache(digest, self._cache_name)
        try:
            if path is not None:
                packed = open_packed(path)
                # Kept by a server with a larger --max-rank: to be refused, below.
                if packed.num_parts <= -(-self._max_rank // GRANULE_RANK):
                    return packed
        except (SafetensorError, OSError) as error:
            log.warning("packing adapter %s again: %s", digest[:12], error)
        try:
            return self._pack(digest, self._spec(self._blobs.blob(digest)))
        except AdapterInvalidError as error:
            raise RequestError(
                "ADAPTER_UNUSABLE", f"this server does not serve it: {error.message}"
            ) from error

    def _spec(self, folder: Path) -> AdapterSpec:
        """Judged anew: an older server, or one with a larger --max-rank, may have taken it."""
        with storage_errors():
            config_json = (folder / CONFIG_NAME).read_text(encoding="utf-8")
            config = read_config(config_json, sys.maxsize)
            spec = read_adapter(folder / WEIGHTS_NAME, config, self._linears, sys.maxsize)
        if spec.rank > self._max_rank:
            raise RequestError(
                "ADAPTER_UNUSABLE",
                f"rank {spec.rank} is over this server's {self._max_rank} (--max-rank)",
            )
        return spec

    def _pack(self, version: str, spec: AdapterSpec) -> PackedAdapter:
        weights = self._blobs.blob(version) / WEIGHTS_NAME
        packed = pack(weights, spec, self._layout, self._base_weights)
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


def _step_back() -> None:
    """In a new worker thread: one core at most, and only what the steps leave of it."""
    torch.set_num_threads(1)
    give_way()
