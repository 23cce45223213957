"""Judge an uploaded adapter, pack it for its first use, and make both durable."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from loraplex.adapters.peft import (
    AdapterConfig,
    AdapterSpec,
    BaseLinear,
    read_adapter,
    read_config,
    version_of,
)
from loraplex.adapters.store import AdapterRecord, AdapterStore, Upload
from loraplex.adapters.store_files import storage_errors


class Packer(Protocol):
    """The loader, as far as the publisher needs it."""

    def pack_upload(self, weights: Path, spec: AdapterSpec) -> dict[str, Path]:
        """The caches of an adapter about to be published, beside its weights, by name.

        Those that cannot be written are left out.
        """


class Publisher:
    """What the API needs to take an adapter in; blocks, so it is called from worker threads."""

    def __init__(
        self,
        store: AdapterStore,
        packer: Packer,
        linears: Mapping[str, BaseLinear],
        base_name: str,
        base_id: str,
        max_rank: int,
    ) -> None:
        self._store = store
        self._packer = packer
        self._linears = linears
        self._base_name = base_name
        self._base_id = base_id
        self._max_rank = max_rank

    def check_config(self, config_json: str) -> AdapterConfig:
        """AdapterInvalidError names the key this server would not compute exactly."""
        return read_config(config_json, self._max_rank)

    def publish(
        self, upload: Upload, config: AdapterConfig, sha256: str
    ) -> tuple[AdapterRecord, bool, Sequence[str]]:
        """(record, created, warnings) once the adapter is on disk; RequestError when refused.

        `sha256` is what `upload.finish` answered. After a refusal the upload is still its caller's,
        who suspends or discards it.
        """
        with storage_errors():
            spec = read_adapter(upload.path, config, self._linears, self._max_rank)
            packed = self._packer.pack_upload(upload.path, spec)
        version = version_of(sha256, config, self._base_id)
        record, created = self._store.publish(upload, version, spec, sha256, packed)
        return record, created, (*spec.warnings, *self._base_warnings(config))

    def _base_warnings(self, config: AdapterConfig) -> Iterator[str]:
        """The base an adapter names is informational, and compared by its last part alone."""
        named = (config.base_model or "").rstrip("/").rsplit("/", 1)[-1].lower()
        if named and named != self._base_name.lower():
            yield (
                f"base_model_name_or_path is {named!r}, but this server runs {self._base_name!r}"
            )
