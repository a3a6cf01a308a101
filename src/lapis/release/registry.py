"""The registry: releases and their weights, verified when they come in and whenever they are resolved."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import ConflictError, InputError, IntegrityError, NotFoundError, nearest
from lapis.hashing import canonical_json, digest_file
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.model import manifest as manifests
from lapis.model.store import ModelStore
from lapis.release import gates, lineage
from lapis.release.gates import Gate
from lapis.release.release import SERVABLE, Release, State, check_move, check_name, parse_reference
from lapis.storage import lock
from lapis.tables.releases import releases


@dataclass(frozen=True)
class Servable:
    """A model that may be served as `name`: the weights of a release, a pulled model, or a fine-tuned one."""

    name: str
    folder: Path
    digest: str
    kind: Literal["release", "pulled", "fine_tuned"]
    licence: str
    base: str | None = None  # the name of the model that it is an adapter of
    owner: str = "lapis"  # the organization of a fine-tuned model
    projects: frozenset[str] | None = None  # those that may know and use it; None: all
    created_at: float | None = None

    def visible_to(self, project_id: str | None) -> bool:
        """Whether a project (None: nobody in particular) may know of it."""
        return self.projects is None or project_id in self.projects


class Registry:
    """The releases of an installation. Their weights lie at releases/<name>/<version>/ below the home."""

    def __init__(self, home: Home, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.folder = home.releases
        self.store = ModelStore(home)
        self.audit = AuditLog(db, clock)

    def create(
        self,
        name: str,
        model_folder: Path,
        run_id: str | None,
        eval_report: Mapping[str, Any] | None,
        actor: str,
        origin: Mapping[str, Any] | None = None,
        progress: Progress = silent,
    ) -> Release:
        """Keep a verified copy of a model folder as the next version of a release.

        `origin` adds facts of a Lineage to those of the folder's manifest. Raises IntegrityError naming a
        file that does not match its digest, InputError for what is no model folder, ConflictError while
        another process is making a version of this release.
        """
        check_name(name)
        with lock(self.folder / name / ".lock", f"The release {name}"):
            version = self._next_version(name)
            folder = self.folder / name / str(version)
            if manifests.read_manifest(model_folder).base is not None:
                raise InputError(
                    f"{model_folder} holds an adapter; releases are whole models.",
                    hint="A pulled adapter is served under its own name beside its base: lapis serve",
                )
            manifest = manifests.copy_folder(model_folder, folder, sealed=True, progress=progress)
            facts = {"source": _source(manifest), "licence": manifest.source.licence, "run": run_id}
            way = lineage.from_facts({**facts, **(origin or {})})
            row = {
                "name": name,
                "version": version,
                "state": State.EVALUATED if eval_report is not None else State.DRAFT,
                "digest": manifest.digest,
                "manifest_digest": digest_file(folder / manifests.NAME),
                "run_id": run_id,
                "report": None if eval_report is None else canonical_json(dict(eval_report)),
                "lineage": canonical_json(asdict(way)),
                "created_at": self.clock(),
                "created_by": actor,
                "reason": "",
            }
            with write(self.db, lock=f"release:{name}") as connection:
                connection.execute(releases.insert().values(**row))
                said = {key: row[key] for key in ("state", "digest", "run_id")}
                self.audit.append_in(connection, actor, "release.create", f"{name}:{version}", said)
        return self.show(f"{name}:{version}")

    def record_evaluation(self, reference: str, report: Mapping[str, Any], actor: str) -> Release:
        """Give a draft its evaluation. Raises ConflictError if it has one."""
        text = canonical_json(dict(report))
        facts = {"bits_per_byte": report.get("bits_per_byte")}
        return self._move(reference, State.EVALUATED, actor, facts, {"report": text})

    def approve(self, reference: str, actor: str, force: bool = False, reason: str = "") -> Release:
        """Vouch for a release, so that it may be served.

        Raises ConflictError naming the gates that refuse; `force` with a reason overrides them (not the
        digest), and both are recorded.
        """
        if force and not reason.strip():
            raise InputError("Overriding a gate needs a reason.", hint='--force --reason "…"', param="reason")
        release = self.show(reference)
        check_move(release.id, release.state, State.APPROVED)
        verdicts = self.judge(release)
        gates.require(release.id, verdicts, force)
        facts = {"gates": {gate.name: gate.verdict for gate in verdicts}, "force": force, "reason": reason}
        return self._move(release.id, State.APPROVED, actor, facts, {"approved_by": actor, "reason": reason})

    def go_live(self, reference: str, actor: str) -> Release:
        """Record that a release was taken into service; nothing changes if it was before."""
        release = self.show(reference)
        if release.state is State.LIVE:
            return release
        return self._move(release.id, State.LIVE, actor, {"digest": release.digest}, {})

    def retire(self, reference: str, actor: str, reason: str = "") -> Release:
        """Serve a release no more; weights and record stay. Raises ConflictError if it is retired."""
        return self._move(reference, State.RETIRED, actor, {"reason": reason}, {})

    def show(self, reference: str) -> Release:
        """A release by `name:version`, or the newest version of `name`. Raises NotFoundError."""
        with self.db.connect() as connection:
            return self._release(_find(connection, reference))

    def list(self, name: str | None = None) -> Sequence[Release]:
        """All releases, or the versions of one name; by name, oldest version first."""
        query = sa.select(releases).order_by(releases.c.name, releases.c.version)
        if name is not None:
            query = query.where(releases.c.name == name)
        with self.db.connect() as connection:
            return [self._release(row) for row in connection.execute(query)]

    def judge(self, release: Release) -> Sequence[Gate]:
        """The verdicts of all gates; reads every byte of the weights."""
        damage = ""
        try:
            self._verify(release)
        except IntegrityError as error:
            damage = error.message
        return gates.judge(release.report, release.lineage, release.digest, damage)

    def servables(self) -> Sequence[Servable]:
        """All names that can be served: approved and live releases (`name`: the newest), pulled models."""
        found: dict[str, Servable] = {}
        for release in self.list():
            if release.state in SERVABLE:
                for name in (release.name, release.id):  # a later version takes the bare name over
                    found[name] = _servable(release, name)
        for model in self.store.list():
            pulled = Servable(model.name, model.folder, model.digest, "pulled", model.licence, model.base)
            found.setdefault(model.name, pulled)
        return list(found.values())

    def resolve(self, reference: str) -> Servable:
        """The model to serve for `name` or `name:version`, its weights verified.

        Raises NotFoundError with the nearest name, ConflictError for a release that is not approved,
        IntegrityError for weights that are not those that were registered.
        """
        name, version = parse_reference(reference)
        versions = [release for release in self.list(name) if version in (None, release.version)]
        for release in reversed(versions):
            if release.state in SERVABLE:
                self._verify(release)
                return _servable(release, reference)
        by_name = {servable.name: servable for servable in self.servables()}
        if reference in by_name:
            manifests.verify(by_name[reference].folder)
            return by_name[reference]
        if versions:
            raise ConflictError(
                f"The release {versions[-1].id} is {versions[-1].state}: it may not be served.",
                hint=f"lapis release approve {versions[-1].id}",
            )
        raise NotFoundError(
            f"There is no model {reference!r}. {nearest(reference, by_name)}".rstrip(),
            hint=f"`lapis models list` shows what is there; to fetch it: lapis pull {name}",
        )

    def _move(
        self, reference: str, to: State, actor: str, facts: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> Release:
        name, _ = parse_reference(reference)
        with write(self.db, lock=f"release:{name}") as connection:
            row = _find(connection, reference)
            release_id = f"{row.name}:{row.version}"
            check_move(release_id, State(row.state), to)
            here = (releases.c.name == row.name) & (releases.c.version == row.version)
            connection.execute(releases.update().where(here).values(state=to, **changes))
            said = {"from": row.state, "to": to, **facts}
            self.audit.append_in(connection, actor, f"release.{_VERBS[to]}", release_id, said)
            return self._release(_find(connection, release_id))

    def _verify(self, release: Release) -> None:
        hint = f"Serve another version, or make a new one; see: lapis release show {release.name}"
        try:
            if digest_file(release.folder / manifests.NAME) != release.manifest_digest:
                raise IntegrityError(f"{manifests.NAME} is not the one it was registered with.")
            manifests.verify(release.folder)
        except OSError as error:
            raise IntegrityError(
                f"The weights of {release.id} cannot be read: {error.strerror} ({release.folder}).", hint=hint
            ) from error
        except IntegrityError as error:
            raise IntegrityError(f"{release.id}: {error.message}", hint=hint) from error

    def _release(self, row: Row[Any]) -> Release:
        facts = {**row._mapping, "state": State(row.state)}
        facts["report"] = None if row.report is None else json.loads(row.report)
        facts["lineage"] = lineage.from_facts(json.loads(row.lineage))
        return Release(folder=self.folder / row.name / str(row.version), **facts)

    def _next_version(self, name: str) -> int:
        """One more than any version in the table or on the disk; called with the name's lock held.

        A `create` that was killed leaves a half copy, which goes, or a whole one in no table, which stays.
        """
        for left in self.folder.glob(f"{name}/.*.part"):
            shutil.rmtree(left)
        kept = [int(path.name) for path in self.folder.glob(f"{name}/*") if path.name.isdecimal()]
        return 1 + max([0, *kept, *(release.version for release in self.list(name))])


_VERBS = {
    State.EVALUATED: "evaluate",
    State.APPROVED: "approve",
    State.LIVE: "go_live",
    State.RETIRED: "retire",
}


def _find(connection: Connection, reference: str) -> Row[Any]:
    name, version = parse_reference(reference)
    query = sa.select(releases).where(releases.c.name == name).order_by(releases.c.version.desc()).limit(1)
    if version is not None:
        query = query.where(releases.c.version == version)
    row = connection.execute(query).one_or_none()
    if row is None:
        columns = sa.select(releases.c.name, releases.c.version)
        known = [f"{found.name}:{found.version}" for found in connection.execute(columns)]
        raise NotFoundError(
            f"There is no release {reference!r}. {nearest(reference, known)}".rstrip(),
            hint="lapis release show",
        )
    return row


def _servable(release: Release, name: str) -> Servable:
    return Servable(name, release.folder, release.digest, "release", release.lineage.licence)


def _source(manifest: manifests.Manifest) -> str:
    return f"{manifest.source.kind}: {manifest.source.reference}"
