"""From a model's name to its deployment. The catalog decides what is served, and may change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lapis.errors import NotFoundError, nearest
from lapis.gateway.deployment import Build, Deployment
from lapis.release.registry import Servable

Catalog = Callable[[], Sequence[Servable]]

FRESH = 1.0  # seconds for which the catalog is believed


class Router:
    """Names to deployments, one deployment per digest: two names of the same weights share one engine.

    An adapter is served by its base's deployment. One whose base is not served is not there either.
    """

    def __init__(self, catalog: Catalog, build: Build) -> None:
        self._catalog = catalog
        self._build = build
        self._deployments: dict[str, Deployment] = {}
        self._servables: dict[str, Servable] = {}
        self._read_at = float("-inf")

    def find(self, name: str) -> Deployment:
        """The deployment behind a name. Raises NotFoundError with the nearest name."""
        return self.lookup(name)[1]

    def lookup(self, name: str) -> tuple[Servable, Deployment]:
        """What is served under a name. Raises NotFoundError with the nearest name."""
        self._refresh()
        if name not in self._servables:
            self._refresh(at_once=True)
        if name not in self._servables:
            raise NotFoundError(
                f"There is no model {name!r} here. {nearest(name, self._servables)}".strip(), param="model"
            )
        servable = self._servables[name]
        return servable, self._deployments[self._base(servable).digest]

    def models(self) -> list[tuple[Servable, Deployment]]:
        """What is served, by name; `name:version` only where `name` is not served as well."""
        self._refresh()
        known = self._servables
        names = sorted(name for name in known if ":" not in name or name.partition(":")[0] not in known)
        return [(known[name], self._deployments[self._base(known[name]).digest]) for name in names]

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
            deployment = self._deployments.setdefault(item.digest, Deployment(item, self._build))
            if deployment.servable.name not in self._servables:
                deployment.servable = item  # the name it had before was retired
        self._drop_retired()
        for digest, deployment in self._deployments.items():
            deployment.keep_adapters(adapters.get(digest, {}))

    def _base(self, servable: Servable) -> Servable:
        return servable if servable.base is None else self._servables[servable.base]

    def _drop_retired(self) -> None:
        served = {item.digest for item in self._servables.values()}
        for digest, deployment in list(self._deployments.items()):
            if digest not in served and deployment.active == 0:
                deployment.close()
                del self._deployments[digest]
