"""Judge an uploaded adapter, pack it for its first use, and make both durable."""

from collections.abc import Iterator, Mapping, Sequence

from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.peft import (
    AdapterConfig,
    BaseLinear,
    read_adapter,
    read_config,
    version_of,
)
from loraplex.adapters.store import AdapterRecord, AdapterStore, Upload
from loraplex.adapters.store_files import storage_errors


class Publisher:
    """What the API needs to take an adapter in; blocks, so it is called from worker threads."""

    def __init__(
        self,
        store: AdapterStore,
        loader: AdapterLoader,
        linears: Mapping[str, BaseLinear],
        base_name: str,
        base_id: str,
        max_rank: int,
    ) -> None:
        self._store = store
        self._loader = loader
        self._linears = linears
        self._base_name = base_name
        self._base_id = base_id
        self._max_rank = max_rank

    def check_config(self, config_json: str) -> AdapterConfig:
        """AdapterInvalidError names the key this server would not compute exactly."""
        return read_config(config_json, self._max_rank)

    def publish(
        self, upload: Upload, adapter_id: str, config: AdapterConfig, sha256: str, visibility: str
    ) -> tuple[AdapterRecord, bool, Sequence[str]]:
        """(record, created, warnings) once the adapter is on disk; RequestError when refused."""
        with storage_errors():
            spec = read_adapter(upload.path, config, self._linears, self._max_rank)
            packed = self._loader.pack_upload(upload.path, spec)
        version = version_of(sha256, config, self._base_id)
        record, created = self._store.publish(
            upload, adapter_id, version, spec, sha256, visibility, packed
        )
        return record, created, (*spec.warnings, *self._base_warnings(config))

    def _base_warnings(self, config: AdapterConfig) -> Iterator[str]:
        """The base an adapter names is informational, and compared by its last part alone."""
        named = (config.base_model or "").rstrip("/").rsplit("/", 1)[-1].lower()
        if named and named != self._base_name.lower():
            yield (
                f"base_model_name_or_path is {named!r}, but this server runs {self._base_name!r}"
            )
