"""API keys: shown once, kept as a keyed digest, scoped, expiring, revoked at once."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import string
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import AuthError, InputError, NotFoundError, nearest
from lapis.tables.tenants import api_keys, projects
from lapis.tenants.tenant import DEFAULT, Role, Scope, Tenants

MARK = "lapis"  # every key begins with it, so that secret scanners can find a leaked one
ALPHABET = string.ascii_lowercase + string.digits
PREFIX_LENGTH = 10
SECRET_LENGTH = 50  # 36^50 > 2^256: nothing to guess, so a slow hash would buy nothing over a keyed one
NO_SALT, NO_DIGEST = "00" * 32, "0" * 64  # what an unknown prefix is compared with, in the same time


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

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


@dataclass(frozen=True)
class Identity:
    """Who asks: the project that pays, the key (None: the person at the machine), what is allowed."""

    organization_id: str
    project_id: str
    key_id: str | None
    scopes: frozenset[Scope]
    background: bool = False  # a batch's or an eval's request: live traffic goes before it

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

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock
        self.audit = AuditLog(db, clock)

    def create(
        self,
        name: str,
        actor: str,
        *,
        project: str = DEFAULT,
        scopes: Iterable[str] = Role.MEMBER.scopes,
        expires_at: float | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; returned with its text, which is kept nowhere.

        Raises InputError for a name, scope or expiry that cannot be used, NotFoundError for the project.
        """
        made = ApiKey(
            id=f"key_{secrets.token_hex(8)}",
            project_id=Tenants(self.db).project(project).id,
            name=_checked(name),
            prefix=_random(PREFIX_LENGTH),
            scopes=parse_scopes(scopes),
            created_at=self.clock(),
            created_by=actor,
            expires_at=expires_at,
            revoked_at=None,
        )
        if expires_at is not None and not made.created_at < expires_at < math.inf:  # NaN fails too
            raise InputError(
                "The key would be expired already, or never expire.",
                hint="Give at least one day: --expires-days 1",
            )
        text = f"{MARK}_{made.prefix}_{_random(SECRET_LENGTH)}"
        salt = secrets.token_hex(32)
        row = {**vars(made), "scopes": _joined(made.scopes), "salt": salt, "digest": _digest(salt, text)}
        facts = {key: row[key] for key in ("name", "project_id", "prefix", "scopes", "expires_at")}
        with write(self.db) as connection:
            connection.execute(api_keys.insert().values(**row))
            self.audit.append_in(connection, actor, "key.create", made.id, facts)
        return made, text

    def list(self, project_id: str | None = None) -> list[ApiKey]:
        """Keys, oldest first: all of them, or those of one project."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at)
        if project_id is not None:
            query = query.where(api_keys.c.project_id == project_id)
        with self.db.connect() as connection:
            return [_key(row) for row in connection.execute(query)]

    def exist(self) -> bool:
        """Whether any key can be used now: a server that listens to the network needs one."""
        now = self.clock()
        return any(key.state(now) == "active" for key in self.list())

    def revoke(self, prefix: str, actor: str) -> ApiKey:
        """Revoke the key with this prefix or id, from the next request on, for good. Raises NotFoundError."""
        with write(self.db) as connection:
            match = (api_keys.c.prefix == prefix.removeprefix(f"{MARK}_")) | (api_keys.c.id == prefix)
            row = connection.execute(sa.select(api_keys).where(match).with_for_update()).one_or_none()
            if row is None:
                known = connection.execute(sa.select(api_keys.c.prefix)).scalars().all()
                raise NotFoundError(
                    f"There is no key {prefix[:40]!r}. {nearest(prefix, known)}".rstrip(),
                    hint="lapis keys list",
                )
            if row.revoked_at is None:
                connection.execute(
                    api_keys.update().where(api_keys.c.id == row.id).values(revoked_at=self.clock())
                )
                self.audit.append_in(connection, actor, "key.revoke", row.id, {"prefix": row.prefix})
            return _key(connection.execute(sa.select(api_keys).where(api_keys.c.id == row.id)).one())

    def verify(self, text: str) -> Identity:
        """Whose key this is. Raises AuthError; only the holder of its secret learns that it ended.

        Reads the database each time (one indexed row): a revoked key is refused at once, by every server.
        """
        parts = text.split("_") if text.isascii() and text.isprintable() else []
        prefix = parts[1] if len(parts) == 3 and parts[0] == MARK else ""
        both = sa.select(api_keys, projects.c.organization_id).join(projects)
        query = both.where(api_keys.c.prefix == prefix)
        with self.db.connect() as connection:
            row = connection.execute(query).one_or_none()
        salt, digest = (row.salt, row.digest) if row is not None else (NO_SALT, NO_DIGEST)
        right = hmac.compare_digest(_digest(salt, text), digest)
        if row is None or not right:
            raise AuthError("The API key is not valid.", hint="lapis keys create NAME")
        state = _key(row).state(self.clock())
        if state != "active":
            raise AuthError(f"The API key {row.prefix} is {state}.", hint="lapis keys create NAME")
        return Identity(row.organization_id, row.project_id, row.id, _key(row).scopes)

    def identity(self, key_id: str) -> Identity:
        """Whose key this is, by its id: for who showed it before. Raises AuthError once it has ended."""
        query = sa.select(api_keys, projects.c.organization_id).join(projects).where(api_keys.c.id == key_id)
        with self.db.connect() as connection:
            row = connection.execute(query).one_or_none()
        state = "gone" if row is None else _key(row).state(self.clock())
        if row is None or state != "active":
            raise AuthError(f"The API key is {state}.", hint="lapis keys create NAME")
        return Identity(row.organization_id, row.project_id, row.id, _key(row).scopes)


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Scopes by their names. Raises InputError naming the nearest one."""
    found = set()
    for name in names:
        if name not in set(Scope):
            raise InputError(
                f"There is no scope {name!r}. {nearest(name, (s.value for s in Scope))}".rstrip()
            )
        found.add(Scope(name))
    if not found:
        raise InputError("A key without a scope may do nothing.", hint=f"Scopes: {', '.join(Scope)}.")
    return frozenset(found)


def _digest(salt: str, text: str) -> str:
    return hmac.new(bytes.fromhex(salt), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def _joined(scopes: Iterable[Scope]) -> str:
    return " ".join(sorted(scopes))


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        row.id, row.project_id, row.name, row.prefix, frozenset(Scope(name) for name in row.scopes.split()),
        row.created_at, row.created_by, row.expires_at, row.revoked_at,
    )  # fmt: skip


def _checked(name: str) -> str:
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise InputError(f"The key's name {name[:40]!r} cannot be used: 1 to 200 printable characters.")
    return name
