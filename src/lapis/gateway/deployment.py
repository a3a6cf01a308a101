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
    """One digest's engine. `active` counts the requests that use it now."""

    def __init__(self, servable: Servable, build: Build) -> None:
        self.servable = servable
        self.since = int(time.time())
        self.active = 0
        self.loaded: Engine | None = None
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

    def load(self) -> Engine:
        """The engine, loaded now if it is not yet. Raises IntegrityError."""
        with self._lock:
            if self.loaded is None:
                self._check_digest()
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

    def _check_digest(self) -> None:
        found = read_manifest(self.servable.folder).digest
        if found != self.servable.digest:
            raise IntegrityError(
                f"The weights of {self.servable.name!r} are not those that were registered: "
                f"digest {found[:12]} instead of {self.servable.digest[:12]}.",
                hint=f"Look at it with: lapis models show {self.servable.name}",
            )
