"""Judge an uploaded adapter and make it durable, then pack it for its first use."""

import logging
from collections.abc import Mapping, Sequence

from loraplex.adapters.loader import AdapterLoader
from loraplex.adapters.peft import (
    AdapterConfig,
    BaseLinear,
    read_adapter,
    read_config,
    version_of,
)
from loraplex.adapters.store import AdapterRecord, AdapterStore, Upload

log = logging.getLogger(__name__)


class Publisher:
    """What the API needs to take an adapter in; blocks, so it is called from worker threads."""

    def __init__(
        self,
        store: AdapterStore,
        loader: AdapterLoader,
        linears: Mapping[str, BaseLinear],
        base_id: str,
        max_rank: int,
    ) -> None:
        self._store = store
        self._loader = loader
        self._linears = linears
        self._base_id = base_id
        self._max_rank = max_rank

    def check_config(self, config_json: str) -> AdapterConfig:
        """AdapterInvalidError names the key this server would not compute exactly."""
        return read_config(config_json, self._max_rank)

    def publish(
        self, upload: Upload, adapter_id: str, config: AdapterConfig, sha256: str, visibility: str
    ) -> tuple[AdapterRecord, bool, Sequence[str]]:
        """(record, created, warnings) once the adapter is on disk; RequestError when refused."""
        spec = read_adapter(upload.path, config, self._linears, self._max_rank)
        version = version_of(sha256, config, self._base_id)
        record, created = self._store.publish(upload, adapter_id, version, spec, sha256, visibility)
        try:
            self._loader.pack(version, spec)
        except OSError as error:  # the adapter is safe; its first use packs it in memory
            log.warning("adapter %s could not be packed ahead: %s", version[:12], error)
        return record, created, spec.warnings
