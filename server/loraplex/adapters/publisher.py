"""Judge an uploaded adapter, pack it for its first use, and make both durable."""

from collections.abc import Mapping, Sequence
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
from loraplex.errors import AdapterInvalidError, RequestError


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
            spec = self._judge(upload, config)
            packed = self._packer.pack_upload(upload.path, spec)
        version = version_of(sha256, config, self._base_id)
        record, created, repaired = self._store.publish(upload, version, spec, sha256, packed)
        warnings = list(spec.warnings)
        if repaired and not created:
            warnings.append(f"{record.adapter_id} was quarantined, and this upload repaired it")
        if (other := config.other_base(self._base_name)) is not None:
            warnings.append(
                f"base_model_name_or_path is {other!r}, but this server runs {self._base_name!r}"
            )
        return record, created, warnings

    def _judge(self, upload: Upload, config: AdapterConfig) -> AdapterSpec:
        try:
            return read_adapter(upload.path, config, self._linears, self._max_rank)
        except AdapterInvalidError as error:
            other = config.other_base(self._base_name)
            if other is None:
                raise
            raise RequestError(
                error.reason.name,
                f"{error.message} (the adapter says that it was trained for {other!r}; this server"
                f" runs {self._base_name!r})",
                field=error.field,
            ) from error
