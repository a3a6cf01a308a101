"""API keys: shown once, kept as a keyed digest, scoped, expiring, revoked at once. Each belongs to a project."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.audit import AuditLog, os_user
from lapis.db import write
from lapis.errors import AuthError, ConflictError, InputError, NotFoundError, nearest
from lapis.prepared import Prepared
from lapis.tables.people import project_users, service_accounts, users
from lapis.tables.tenants import api_keys, projects
from lapis.tenants.policy import EVERY_MODEL, ModelPolicy, policy_of
from lapis.tenants.secret import MARK, LastUsed, Secret, matches, new_secret, prefix_of
from lapis.tenants.tenant import DEFAULT, Role, Scope, Tenants, require_open_project

# A key with its project, and the place that its owner has there.
_VERIFIED = (
    sa.select(
        api_keys,
        projects.c.organization_id,
        projects.c.archived_at,
        projects.c.models_mode,
        projects.c.models,
        users.c.role.label("user_role"),
        project_users.c.role.label("project_role"),
        service_accounts.c.role.label("account_role"),
    )
    .join_from(api_keys, projects)
    .outerjoin(users, users.c.id == api_keys.c.user_id)
    .outerjoin(
        project_users,
        (project_users.c.project_id == api_keys.c.project_id)
        & (project_users.c.user_id == api_keys.c.user_id),
    )
    .outerjoin(service_accounts, service_accounts.c.id == api_keys.c.service_account_id)
)
_BY_PREFIX = Prepared(_VERIFIED.where(api_keys.c.prefix == sa.bindparam("prefix")))


Later = Callable[..., None]  # takes work and its arguments


def at_once(work: Callable[..., Any], *arguments: Any) -> None:
    """Do work now that might be done later."""
    work(*arguments)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key after its text was shown: everything but the secret."""

    id: str
    project_id: str
    name: str
    prefix: str
    scopes: frozenset[Scope]
    created_at: float
    created_by: str
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None = None  # to a minute
    user_id: str | None = None
    service_account_id: str | None = None

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True)
class Identity:
    """Who asks: the project that pays, the key (None: the person at the machine), what is allowed.

    `user_id` or `service_account_id` say whose the key is, where it is somebody's.
    """

    organization_id: str
    project_id: str
    key_id: str | None
    scopes: frozenset[Scope]
    background: bool = False  # a batch's or an eval's request: live traffic goes before it
    user_id: str | None = None
    service_account_id: str | None = None
    models: ModelPolicy = EVERY_MODEL  # which ones the project may use

    @property
    def actor(self) -> str:
        """Who it is in the audit log."""
        if self.key_id is not None:
            return f"key:{self.key_id}"
        return os_user() if self.user_id is None else f"user:{self.user_id}"

    def require(self, scope: Scope) -> None:
        """Raises AuthError if the scope is not among the identity's."""
        if scope not in self.scopes:
            raise AuthError(
                f"This key may not do this: it lacks the scope {scope.value!r}.",
                hint=f"lapis keys create NAME --scope {scope.value}",
            )


LOCAL = Identity(DEFAULT, DEFAULT, None, Role.OWNER.scopes)  # the person at the machine


class ApiKeys:
    """The keys of an installation. Every change is audited with it."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time, later: Later = at_once) -> None:
        """`later` writes down when a key was used: whoever verifies it in an event loop must not wait for that."""
        self.db = db
        self.clock = clock
        self._later = later
        self.audit = AuditLog(db, clock)
        self._used = LastUsed()

    def create(
        self,
        name: str,
        actor: str,
        *,
        project: str = DEFAULT,
        scopes: Iterable[str] = Role.MEMBER.scopes,
        expires_at: float | None = None,
        user_id: str | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key of a project (by its name or id); returned with its text, which is kept nowhere.

        Raises InputError for a name, scope or expiry that cannot be used, NotFoundError for the project,
        ConflictError for an archived one.
        """
        found = Tenants(self.db).project(project)
        with write(self.db) as connection:
            require_open_project(connection, found.id, found.organization_id)
            return self.create_in(
                connection, name, actor, found.id, scopes=scopes, expires_at=expires_at, user_id=user_id
            )

    def create_in(
        self,
        connection: Connection,
        name: str,
        actor: str,
        project_id: str,
        *,
        scopes: Iterable[str] = Role.MEMBER.scopes,
        expires_at: float | None = None,
        user_id: str | None = None,
        service_account_id: str | None = None,
    ) -> tuple[ApiKey, str]:
        """As `create`, in the caller's `db.write` transaction, for a project that is known to be there."""
        secret, text = new_secret()
        made = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            project_id=project_id,
            name=checked_key_name(name),
            prefix=secret.prefix,
            scopes=parse_scopes(scopes),
            created_at=self.clock(),
            created_by=actor,
            expires_at=expires_at,
            revoked_at=None,
            user_id=user_id,
            service_account_id=service_account_id,
        )
        check_expiry(expires_at, made.created_at)
        row = {**vars(made), **vars(secret), "scopes": _joined(made.scopes)}
        facts = {key: row[key] for key in ("name", "project_id", "prefix", "scopes", "expires_at")}
        owner = {"user_id": user_id, "service_account_id": service_account_id}
        facts |= {key: value for key, value in owner.items() if value is not None}
        connection.execute(api_keys.insert().values(**row))
        self.audit.append_in(connection, actor, "key.create", made.id, facts)
        return made, text

    def list(self, project_id: str | None = None) -> list[ApiKey]:
        """Keys, oldest first: all of them, or those of one project."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at)
        if project_id is not None:
            query = query.where(api_keys.c.project_id == project_id)
        with self.db.connect() as connection:
            return [key_of(row) for row in connection.execute(query)]

    def exist(self) -> bool:
        """Whether any key can be used now: a server that listens to the network needs one."""
        now = self.clock()
        return any(key.state(now) == "active" for key in self.list())

    def revoke(self, prefix: str, actor: str, project_id: str | None = None) -> ApiKey:
        """Revoke the key with this prefix or id, from the next request on, for good. Raises NotFoundError."""
        match = (api_keys.c.prefix == prefix.removeprefix(f"{MARK}_")) | (api_keys.c.id == prefix)
        if project_id is not None:
            match &= api_keys.c.project_id == project_id
        with write(self.db) as connection:
            row = connection.execute(sa.select(api_keys).where(match).with_for_update()).one_or_none()
            if row is None or (project_id is not None and row.revoked_at is not None):
                query = sa.select(api_keys.c.prefix)
                known = () if project_id is not None else connection.execute(query).scalars().all()
                raise NotFoundError(
                    f"There is no key {prefix[:40]!r}. {nearest(prefix, known)}".rstrip(),
                    hint="lapis keys list",
                )
            self.revoke_in(connection, [row], actor)
            return key_of(connection.execute(sa.select(api_keys).where(api_keys.c.id == row.id)).one())

    def revoke_in(self, connection: Connection, rows: Iterable[Row[Any]], actor: str) -> None:
        """Revoke keys of `api_keys` in the caller's transaction; those that are revoked already stay so."""
        for row in rows:
            if row.revoked_at is None:
                ended = api_keys.update().where(api_keys.c.id == row.id).values(revoked_at=self.clock())
                connection.execute(ended)
                facts = {"prefix": row.prefix, "project_id": row.project_id}
                self.audit.append_in(connection, actor, "key.revoke", row.id, facts)

    def update(
        self,
        key_id: str,
        project_id: str,
        actor: str,
        *,
        scopes: Iterable[str] | None = None,
        expires_at: float | None = None,
    ) -> None:
        """Give a key other scopes or another end. Raises NotFoundError, ConflictError for one that ended."""
        with write(self.db) as connection:
            mine = (api_keys.c.id == key_id) & (api_keys.c.project_id == project_id)
            row = connection.execute(sa.select(api_keys).where(mine).with_for_update()).one_or_none()
            if row is None or row.revoked_at is not None:
                raise NotFoundError(f"There is no key {key_id[:60]!r}.")
            now = self.clock()
            if key_of(row).state(now) == "expired":
                raise ConflictError(f"The key {row.prefix} is expired; make another one.")
            changes: dict[str, Any] = {}
            if scopes is not None:
                changes["scopes"] = _joined(parse_scopes(scopes))
            if expires_at is not None:
                check_expiry(expires_at, now)
                changes["expires_at"] = expires_at
            if changes:
                connection.execute(api_keys.update().where(mine).values(**changes))
                facts = {**changes, "project_id": project_id}
                self.audit.append_in(connection, actor, "key.update", key_id, facts)

    def verify(self, text: str) -> Identity:
        """Whose key this is. Raises AuthError; only the holder of its secret learns that it ended.

        Reads the database each time (one indexed row): a revoked key is refused at once, by every server.
        """
        with self.db.connect() as connection:
            found = _BY_PREFIX.rows(connection, {"prefix": prefix_of(text)})
        row = found[0] if found else None  # prefixes are unique
        if (
            not matches(text, None if row is None else Secret(row.prefix, row.salt, row.digest))
            or row is None
        ):
            raise AuthError("The API key is not valid.", hint="lapis keys create NAME")
        return self._admitted(row)

    def identity(self, key_id: str) -> Identity:
        """Whose key this is, by its id: for who showed it before. Raises AuthError once it has ended."""
        with self.db.connect() as connection:
            row = connection.execute(_VERIFIED.where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise AuthError("The API key is gone.", hint="lapis keys create NAME")
        return self._admitted(row)

    def _admitted(self, row: Row[Any]) -> Identity:
        key, now = key_of(row), self.clock()
        if key.state(now) != "active":
            raise AuthError(f"The API key {row.prefix} is {key.state(now)}.", hint="lapis keys create NAME")
        if row.archived_at is not None:
            raise AuthError(f"The project of the API key {row.prefix} is archived.")
        if not has_access(row):
            raise AuthError(f"The owner of the API key {row.prefix} has no access to its project.")
        if self._used.due(key.id, key.last_used_at, now):
            self._later(self._note_use, key.id, now)
        return Identity(
            row.organization_id, key.project_id, key.id, key.scopes,
            user_id=key.user_id, service_account_id=key.service_account_id,
            models=policy_of(row.models_mode, row.models),
        )  # fmt: skip

    def _note_use(self, key_id: str, now: float) -> None:
        with write(self.db) as connection:
            connection.execute(api_keys.update().where(api_keys.c.id == key_id).values(last_used_at=now))


def has_access(row: Row[Any]) -> bool:
    """Whether the owner of a key, a row with `user_role`, `project_role`, `account_role`, may use its project.

    A key that is nobody's is the project's own.
    """
    if row.service_account_id is not None:
        return row.account_role in (Role.OWNER, Role.MEMBER)
    return row.user_id is None or row.user_role == Role.OWNER or row.project_role is not None


def owned_keys() -> sa.Select[Any]:
    """Keys with what `has_access` asks for, and the roles of their owners."""
    return _VERIFIED


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by their names. Raises InputError naming the nearest one."""
    found = set()
    for name in names:
        if name not in set(Scope):
            raise InputError(
                f"There is no scope {name!r}. {nearest(name, (s.value for s in Scope))}".rstrip(),
                param="scopes",
            )
        found.add(Scope(name))
    if not found:
        raise InputError("A key without a scope may do nothing.", hint=f"Scopes: {', '.join(Scope)}.")
    return frozenset(found)


def key_of(row: Row[Any]) -> ApiKey:
    """A row of `api_keys` without its secret."""
    return ApiKey(
        row.id, row.project_id, row.name, row.prefix, frozenset(Scope(name) for name in row.scopes.split()),
        row.created_at, row.created_by, row.expires_at, row.revoked_at, row.last_used_at,
        row.user_id, row.service_account_id,
    )  # fmt: skip


def checked_key_name(name: str) -> str:
    """A key's name. Raises InputError for one that cannot be used."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise InputError(
            f"The key's name {name[:40]!r} cannot be used: 1 to 200 printable characters.", param="name"
        )
    return name


def check_expiry(expires_at: float | None, now: float) -> None:
    """Raises InputError for an end that is over already, or that never comes."""
    if expires_at is not None and not now < expires_at < math.inf:  # NaN fails too
        raise InputError(
            "The key would be expired already, or never expire.",
            hint="Give at least one day: --expires-days 1",
        )


def _joined(scopes: Iterable[Scope]) -> str:
    return " ".join(sorted(scopes))
