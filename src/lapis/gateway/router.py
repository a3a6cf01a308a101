"""From a model's name to its deployment. The catalog decides what is served, and may change."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lapis.errors import ConfigError, NotFoundError, UnavailableError, nearest
from lapis.gateway.deployment import Build, Deployment, Record
from lapis.gateway.memory import Held, MemoryBudget, to_unload
from lapis.inference.engine import Engine
from lapis.log import bytes_text, logger
from lapis.release.registry import Servable
from lapis.tenants.keys import Identity

Catalog = Callable[[], Sequence[Servable]]

FRESH = 1.0  # seconds for which the catalog is believed
RETRY_SECONDS = 5.0  # what is said to come back after where all loaded models are in use


class Router:
    """Names to deployments, one deployment per digest: two names of the same weights share one engine.

    An adapter is served by its base's deployment. One whose base is not served is not there either.
    With a memory budget, loading a model unloads those that have been idle for longest, as far as needed.
    """

    def __init__(
        self,
        catalog: Catalog,
        build: Build,
        memory: MemoryBudget | None = None,
        record: Record = lambda servable: None,
    ) -> None:
        self._catalog = catalog
        self._build = build
        self._record = record  # called before every load
        self._memory = memory
        self._sizes: dict[str, int] = {}  # by digest
        self._deployments: dict[str, Deployment] = {}
        self._servables: dict[str, Servable] = {}
        self._read_at = float("-inf")

    def find(self, name: str, viewer: Identity | None = None) -> Deployment:
        """The deployment behind a name. Raises as `lookup`."""
        return self.lookup(name, viewer)[1]

    def lookup(self, name: str, viewer: Identity | None = None) -> tuple[Servable, Deployment]:
        """What is served under a name to whoever asks; without a viewer only what everybody may use.

        Raises NotFoundError with the nearest name, in the same words where the model is somebody else's.
        """
        self._refresh()
        servable = self._seen(name, viewer)
        if servable is None:
            self._refresh(at_once=True)
            servable = self._seen(name, viewer)
        if servable is None:
            known = self._visible(viewer)
            raise NotFoundError(
                f"There is no model {name!r} here. {nearest(name, known)}".strip(), param="model"
            )
        return servable, self._deployments[self._base(servable).digest]

    def loaded(self, name: str) -> Engine | None:
        """The engine behind a name as far as it is known and loaded; asks nobody and loads nothing."""
        servable = self._servables.get(name)
        return None if servable is None else self._deployments[self._base(servable).digest].loaded

    def models(self, viewer: Identity | None = None) -> list[tuple[Servable, Deployment]]:
        """What is served to whoever asks, by name; `name:version` only where `name` is not served as well."""
        self._refresh()
        known = self._visible(viewer)
        found = [known[name] for name in sorted(known) if not _is_named_shorter(known[name], known)]
        return [(servable, self._deployments[self._base(servable).digest]) for servable in found]

    def engines(self) -> list[Engine]:
        """The engines that are loaded, whoever may use their models."""
        return [one.loaded for one in self._deployments.values() if one.loaded is not None]

    def load(self, names: Sequence[str]) -> None:
        """Load these models now. Raises NotFoundError, IntegrityError, ConfigError if they do not fit together."""
        deployments = list(dict.fromkeys(self.find(name) for name in names))
        if self._memory is not None:
            together = sum(self._size(deployment.servable, self._memory) for deployment in deployments)
            if together > self._memory.bytes:
                raise ConfigError(
                    f"{', '.join(names)} need {bytes_text(together)} with their caches; the budget is "
                    f"{bytes_text(self._memory.bytes)}.",
                    hint="Raise it with --memory, serve smaller forms (--weights int8, --kv-cache int8), or name "
                    "no models: then each is loaded at its first use.",
                )
        for deployment in deployments:
            deployment.load()

    def refresh(self) -> None:
        """Read the catalog at once: it has just been changed."""
        self._refresh(at_once=True)

    def close(self) -> None:
        """End every engine."""
        for deployment in self._deployments.values():
            deployment.close()

    def _refresh(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self._read_at < FRESH:
            return
        found = {item.name: item for item in self._catalog()}
        self._servables = {
            name: item for name, item in found.items() if item.base is None or item.base in found
        }
        self._read_at = time.monotonic()
        adapters: dict[str, dict[str, Servable]] = {}
        for item in self._servables.values():
            if item.base is not None:
                adapters.setdefault(self._base(item).digest, {})[item.name] = item
                continue
            deployment = self._deployments.setdefault(
                item.digest, Deployment(item, self._build, self._make_room, self._record)
            )
            if deployment.servable.name not in self._servables:
                deployment.servable = item  # the name it had before was retired
        self._drop_retired()
        for digest, deployment in self._deployments.items():
            deployment.keep_adapters(adapters.get(digest, {}))

    def _make_room(self, wanted: Deployment) -> list[Engine]:
        """Engines to end before a model is loaded; they are nobody's from now on. Raises UnavailableError."""
        if self._memory is None:
            return []
        size, budget = self._size(wanted.servable, self._memory), self._memory.bytes
        if size > budget:
            raise UnavailableError(
                f"{wanted.servable.name!r} needs {bytes_text(size)} with its cache; this server's models may take "
                f"{bytes_text(budget)}.",
                hint="Start it with more: lapis serve --memory GB",
                param="model",
            )
        held = [
            Held(digest, self._size(one.servable, self._memory), one.active > 0 or one.loading, one.used_at)
            for digest, one in self._deployments.items()
            if one is not wanted and (one.loaded is not None or one.loading)
        ]
        chosen = to_unload(size, budget, held)
        if chosen is None:
            raise UnavailableError(
                f"{wanted.servable.name!r} is not loaded, and all models that could make room for it are in use.",
                retry_after=RETRY_SECONDS,
            )
        engines = []
        for digest in chosen:
            logger.info("%s makes room for %s", self._deployments[digest].servable.name, wanted.servable.name)
            engines.append(self._deployments[digest].take())
        return [engine for engine in engines if engine is not None]

    def _seen(self, name: str, viewer: Identity | None) -> Servable | None:
        servable = self._servables.get(name)
        return servable if servable is not None and _may_see(viewer, servable) else None

    def _visible(self, viewer: Identity | None) -> dict[str, Servable]:
        return {name: item for name, item in self._servables.items() if _may_see(viewer, item)}

    def _size(self, servable: Servable, memory: MemoryBudget) -> int:
        if servable.digest not in self._sizes:
            self._sizes[servable.digest] = memory.size(servable)
        return self._sizes[servable.digest]

    def _base(self, servable: Servable) -> Servable:
        return servable if servable.base is None else self._servables[servable.base]

    def _drop_retired(self) -> None:
        served = {item.digest for item in self._servables.values()}
        for digest, deployment in list(self._deployments.items()):
            if digest not in served and deployment.active == 0 and not deployment.loading:
                deployment.close()
                del self._deployments[digest]


def _may_see(viewer: Identity | None, servable: Servable) -> bool:
    """Whether a model is not another project's, and the viewer's project may use it."""
    if viewer is not None and not viewer.models.allows(servable.name):
        return False
    return servable.visible_to(None if viewer is None else viewer.project_id)


def _is_named_shorter(servable: Servable, known: Mapping[str, Servable]) -> bool:
    """Whether a release is there without its version too."""
    name, version, _ = servable.name.partition(":")
    return servable.kind != "fine_tuned" and bool(version) and name in known
