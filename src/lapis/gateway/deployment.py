"""A servable behind an engine: its manifest is checked and its weights are loaded once, at the first use."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lapis.errors import IntegrityError, NotFoundError
from lapis.inference.engine import Engine
from lapis.log import logger
from lapis.model.manifest import read_manifest
from lapis.release.registry import Servable

Build = Callable[[Servable], Engine]
Record = Callable[[Servable], None]  # that a model is about to be loaded; what it raises stops the load


MakeRoom = Callable[["Deployment"], list[Engine]]


class Deployment:
    """One digest's engine, and the adapters that are served over it. `active` counts the requests now.

    `make_room` is asked before a load; what it gives back are engines that end first, in the loading thread.
    """

    def __init__(
        self,
        servable: Servable,
        build: Build,
        make_room: MakeRoom = lambda deployment: [],
        record: Record = lambda servable: None,
    ) -> None:
        self.servable = servable
        self.since = int(time.time())
        self.active = 0
        self.used_at = time.monotonic()
        self.loaded: Engine | None = None
        self.adapters: dict[str, Servable] = {}  # by name; they are loaded at their first use
        self._adapted: dict[str, str] = {}  # digest of each adapter that the engine has
        self._withdrawn: set[str] = set()  # names of adapters that are served no more
        self._build = build
        self._make_room = make_room
        self._record = record
        self._lock = threading.Lock()
        self._loading: asyncio.Task[Engine] | None = None

    @property
    def loading(self) -> bool:
        """Whether the engine is being loaded."""
        return self._loading is not None and not self._loading.done()

    async def engine(self) -> Engine:
        """The engine, loaded in a thread if this is the first use; all who wait share one load.

        Raises IntegrityError for weights that do not match their digest, UnavailableError where there is no
        room for them now. A failed load is tried again.
        """
        with self._in_use():
            if self.loaded is not None:
                return self.loaded
            if not self.loading:
                ending = self._make_room(self)
                self._loading = asyncio.create_task(asyncio.to_thread(self._load_after, ending))
            assert self._loading is not None
            # A client that leaves does not stop the load for others.
            return await asyncio.shield(self._loading)

    async def engine_for(self, name: str) -> tuple[Engine, str | None]:
        """The engine, and the adapter by which it answers as `name`: its digest, or None for the model itself.

        Until the caller awaits something else it is not unloaded; from then on `active` keeps it. Raises as
        `engine`, what reading an adapter raises, and NotFoundError for one that was withdrawn meanwhile.
        """
        with self._in_use():
            engine = await self.engine()
            adapter = self.adapters.get(name)
            if adapter is None and name in self._withdrawn:  # since its deployment was looked up
                raise NotFoundError(f"The model {name!r} is served no more.", param="model")
            if adapter is None:
                return engine, None
            if self._adapted.get(adapter.digest) is None:
                await asyncio.to_thread(self._adapt, engine, adapter)
            return engine, adapter.digest

    def public_name(self, name: str) -> str:
        """How the metrics, which everybody with a key may read, name a model: one of some projects by its base."""
        adapter = self.adapters.get(name)
        return name if adapter is None or adapter.projects is None else self.servable.name

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self.used_at = time.monotonic()

    def _load_after(self, ending: Sequence[Engine]) -> Engine:
        for engine in ending:
            engine.close()
        return self.load()

    def _adapt(self, engine: Engine, adapter: Servable) -> None:
        with self._lock:
            if adapter.digest in self._adapted:
                return
            _check_digest(adapter)
            self._record(adapter)
            engine.add_adapter(adapter.digest, adapter.folder)
            self._adapted[adapter.digest] = adapter.name

    def keep_adapters(self, adapters: dict[str, Servable]) -> None:
        """Serve these adapters and no others; those under way keep theirs."""
        self._withdrawn = (self._withdrawn | self.adapters.keys()) - adapters.keys()
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
                self._record(self.servable)
                started = time.monotonic()
                self.loaded = self._build(self.servable)
                logger.info("%s loaded in %.1f s", self.servable.name, time.monotonic() - started)
            return self.loaded

    def take(self) -> Engine | None:
        """The engine, if there is one, to be ended by the caller; a later use loads another."""
        with self._lock:
            engine, self.loaded = self.loaded, None
            if not self.loading:
                self._loading = None  # it holds the engine too
            self._adapted.clear()
            return engine

    def close(self) -> None:
        """End the engine; a later use would load it again."""
        engine = self.take()
        if engine is not None:
            engine.close()


def _check_digest(servable: Servable) -> None:
    found = read_manifest(servable.folder).digest
    if found != servable.digest:
        raise IntegrityError(
            f"The weights of {servable.name!r} are not those that were registered: "
            f"digest {found[:12]} instead of {servable.digest[:12]}.",
            hint=f"Look at it with: lapis models show {servable.name}",
        )
