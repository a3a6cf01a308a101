"""A servable behind an engine: its manifest is checked and its weights are loaded once, at the first use."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from lapis.errors import IntegrityError
from lapis.inference.engine import Engine
from lapis.log import logger
from lapis.model.manifest import read_manifest
from lapis.release.registry import Servable

Build = Callable[[Servable], Engine]


class Deployment:
    """One digest's engine, and the adapters that are served over it. `active` counts the requests now."""

    def __init__(self, servable: Servable, build: Build) -> None:
        self.servable = servable
        self.since = int(time.time())
        self.active = 0
        self.loaded: Engine | None = None
        self.adapters: dict[str, Servable] = {}  # by name; they are loaded at their first use
        self._adapted: dict[str, str] = {}  # digest of each adapter that the engine has
        self._build = build
        self._lock = threading.Lock()
        self._loading: asyncio.Task[Engine] | None = None

    async def engine(self) -> Engine:
        """The engine, loaded in a thread if this is the first use; all who wait share one load.

        Raises IntegrityError for weights that do not match their digest. A failed load is tried again.
        """
        if self.loaded is not None:
            return self.loaded
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(asyncio.to_thread(self.load))
        return await asyncio.shield(self._loading)  # a client that leaves does not stop the load for others

    async def engine_for(self, name: str) -> tuple[Engine, str | None]:
        """The engine, and the adapter by which it answers as `name`: its digest, or None for the model itself.

        Raises as `engine`, and what reading an adapter raises.
        """
        engine = await self.engine()
        adapter = self.adapters.get(name)
        if adapter is None:
            return engine, None
        if self._adapted.get(adapter.digest) is None:
            await asyncio.to_thread(self._adapt, engine, adapter)
        return engine, adapter.digest

    def _adapt(self, engine: Engine, adapter: Servable) -> None:
        with self._lock:
            if adapter.digest in self._adapted:
                return
            _check_digest(adapter)
            engine.add_adapter(adapter.digest, adapter.folder)
            self._adapted[adapter.digest] = adapter.name

    def keep_adapters(self, adapters: dict[str, Servable]) -> None:
        """Serve these adapters and no others; those under way keep theirs."""
        self.adapters = adapters
        served = {adapter.digest for adapter in adapters.values()}
        if not self._adapted.keys() - served:
            return
        with self._lock:
            for digest in self._adapted.keys() - served:
                del self._adapted[digest]
                if self.loaded is not None:
                    self.loaded.remove_adapter(digest)

    def load(self) -> Engine:
        """The engine, loaded now if it is not yet. Raises IntegrityError."""
        with self._lock:
            if self.loaded is None:
                _check_digest(self.servable)
                started = time.monotonic()
                self.loaded = self._build(self.servable)
                logger.info("%s loaded in %.1f s", self.servable.name, time.monotonic() - started)
            return self.loaded

    def close(self) -> None:
        """End the engine; a later use would load it again."""
        with self._lock:
            if self.loaded is not None:
                self.loaded.close()
                self.loaded = None
                self._adapted.clear()


def _check_digest(servable: Servable) -> None:
    found = read_manifest(servable.folder).digest
    if found != servable.digest:
        raise IntegrityError(
            f"The weights of {servable.name!r} are not those that were registered: "
            f"digest {found[:12]} instead of {servable.digest[:12]}.",
            hint=f"Look at it with: lapis models show {servable.name}",
        )
