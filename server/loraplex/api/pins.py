"""Pinned names, and the engine's pins of the versions that they stand for, kept in step."""

import asyncio
import logging

from loraplex.adapters.store import AdapterRecord, AdapterState, require_rank, require_ready
from loraplex.api.protocols import EngineLike, StoreLike
from loraplex.api.threads import Background
from loraplex.errors import RequestError

_LOG = logging.getLogger(__name__)


class Pins:
    """A pin is a name's, and written down with it; what the engine keeps is a version.

    Whatever changes a name calls `follow` afterwards. Mutable: `_held`, the version that the engine
    keeps for each name; a pinned name that is not in it found no room, and is tried again when
    another pin goes.
    """

    def __init__(
        self, engine: EngineLike, store: StoreLike, background: Background, max_rank: int
    ) -> None:
        self._engine = engine
        self._store = store
        self._background = background
        self._max_rank = max_rank
        self._held: dict[str, str] = {}
        self._lock = asyncio.Lock()  # held while a name and the engine may differ

    async def pin(self, adapter_id: str) -> AdapterRecord:
        """Raises PINS_EXCEED_MEMORY, or why the adapter cannot be had; then nothing has changed."""
        async with self._lock:
            record = self._store.get(adapter_id)
            require_ready(record)
            try:
                if self._held.get(adapter_id) == record.version:
                    # Again, as the engine may have given up to bring it there.
                    await self._engine.pin(record.version, adapter_id)
                else:
                    self._drop(adapter_id)
                    await self._hold(record)
                return await self._background.run(self._store.set_pinned, adapter_id, True)
            finally:
                await self._follow(adapter_id)

    async def unpin(self, adapter_id: str) -> AdapterRecord:
        try:
            return await self._background.run(self._store.set_pinned, adapter_id, False)
        finally:
            await self.follow(adapter_id)

    async def follow(self, adapter_id: str) -> str | None:
        """The name may stand for something else now, or be gone: so does its pin.

        The answer is why a pinned name is not on the device for good: a warning, not an error.
        """
        if adapter_id not in self._held and self._wanted(adapter_id) is None:
            return None  # and stands behind nobody's pin
        async with self._lock:
            was_held = adapter_id in self._held
            warning = await self._follow(adapter_id)
            if was_held and adapter_id not in self._held:
                await self._retry()
        return warning

    async def restore(self) -> None:
        """What was pinned when the last server stopped. Runs beside the first calls."""
        try:
            async with self._lock:
                await self._retry()
        except Exception:
            _LOG.exception("the pinned adapters are not kept on the device")

    async def _retry(self) -> None:
        for record in self._store.pinned():
            if record.adapter_id not in self._held:
                await self._follow(record.adapter_id)

    async def _follow(self, adapter_id: str) -> str | None:
        wanted = self._wanted(adapter_id)
        if (wanted and wanted.version) == self._held.get(adapter_id):
            return None
        self._drop(adapter_id)
        if wanted is None:
            return None
        try:
            await self._hold(wanted)
        except RequestError as error:
            _LOG.warning("%s is pinned, but not kept on the device: %s", adapter_id, error.message)
            return f"{adapter_id} is pinned, but not kept on the device: {error.message}"
        return None

    def _wanted(self, adapter_id: str) -> AdapterRecord | None:
        """The name's record, if the engine should keep its version."""
        try:
            record = self._store.get(adapter_id)
        except RequestError:
            return None
        return record if record.pinned and record.state is AdapterState.READY else None

    def _drop(self, adapter_id: str) -> None:
        version = self._held.pop(adapter_id, None)
        if version is not None:
            self._engine.unpin(version, adapter_id)

    async def _hold(self, record: AdapterRecord) -> None:
        require_rank(record, self._max_rank)
        self._held[record.adapter_id] = record.version
        try:
            await self._engine.pin(record.version, record.adapter_id)
        except BaseException:
            self._drop(record.adapter_id)
            raise

    def __repr__(self) -> str:
        return f"<Pins held={sorted(self._held)}>"
