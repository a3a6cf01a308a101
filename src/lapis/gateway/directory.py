"""From what an OpenID provider says of a person to a user of ours, with a role and places in projects."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lapis.db import write
from lapis.errors import AuthError, NotFoundError
from lapis.gateway.settings import SignInSettings
from lapis.tables.people import project_users, users
from lapis.tables.sessions import subjects
from lapis.tables.tenants import projects
from lapis.tenants.invites import Invites
from lapis.tenants.keys import Identity
from lapis.tenants.policy import policy_of
from lapis.tenants.tenant import DEFAULT, Role, Tenants
from lapis.tenants.users import User, Users, checked_email, user_of

ACTOR = "sign-in"


@dataclass(frozen=True)
class Granted:
    """What the claims of a person give: a role in the organization, and one in each project (by name)."""

    role: Role
    projects: Mapping[str, Role] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A project that a user may look at."""

    project_id: str
    name: str


def grants(settings: SignInSettings, claims: Mapping[str, Any]) -> Granted | None:
    """What claims give by the settings; None if nothing that is listed is among them.

    Raises AuthError where the provider left the groups out because they are too many.
    """
    left_out = claims.get("_claim_names")
    if isinstance(left_out, dict) and set(left_out) & set(settings.claims):
        raise AuthError(
            "The provider names too many groups to list them.",
            hint="Have it send only the groups that are assigned to the application, or app roles.",
        )
    values: set[str] = set()
    for name in settings.claims:
        value = claims.get(name, ())
        values |= {value} if isinstance(value, str) else {item for item in value if isinstance(item, str)}
    places = {}
    for name, roles in settings.projects.items():
        if values & set(roles.owners):
            places[name] = Role.OWNER
        elif values & set(roles.members):
            places[name] = Role.MEMBER
    if values & set(settings.owners):
        return Granted(Role.OWNER, places)
    return Granted(Role.READER, places) if places or values & set(settings.readers) else None


class Directory:
    """The users who sign in. A user's places are looked up at each use: who was removed is out at once."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.users = Users(db, clock)
        self.invites = Invites(db, clock)

    def admit(self, settings: SignInSettings, claims: Mapping[str, Any]) -> User:
        """The user of a person who has signed in at the provider, made at the first time.

        Where the settings name groups, these decide who comes in, and roles follow them at every sign-in;
        else only users and invited addresses come in. Raises AuthError.
        """
        granted = grants(settings, claims) if settings.managed else None
        if settings.managed and granted is None:
            raise AuthError("You are in no group or role that may use this installation.")
        organization_id = self._organization(settings.organization)
        user = self._known(claims, organization_id, create=granted is not None)
        if granted is not None:
            self._follow(settings, user, granted)
        return self.users.get(user.id, organization_id)

    def identity(self, user_id: str, project_id: str | None) -> Identity:
        """Who a user is in a project, or in the first of the user's places. Raises AuthError.

        Only owners of the organization `default` have the scope admin: it reaches over organizations.
        """
        with self.db.connect() as connection:
            user = _user(connection, user_id)
            rows = connection.execute(_places(user)).all()
        if not rows:
            raise AuthError("You have no place in a project yet.", hint="Ask an administrator for one.")
        row = next((row for row in rows if row.id == project_id), rows[0])
        administrates = user.role is Role.OWNER and user.organization_id == DEFAULT
        return Identity(
            user.organization_id, row.id, None, (Role.OWNER if administrates else Role.MEMBER).scopes,
            user_id=user.id, models=policy_of(row.models_mode, row.models),
        )  # fmt: skip

    def user(self, user_id: str) -> User:
        """A user. Raises AuthError if there is none any more."""
        with self.db.connect() as connection:
            return _user(connection, user_id)

    def places(self, user_id: str) -> list[Place]:
        """The projects that a user may look at, oldest first. Raises AuthError."""
        with self.db.connect() as connection:
            user = _user(connection, user_id)
            return [Place(row.id, row.name) for row in connection.execute(_places(user))]

    def _organization(self, name: str) -> str:
        for found in Tenants(self.db).organizations():
            if name in (found.id, found.name):
                return found.id
        raise AuthError(f"There is no organization {name!r}, which server.toml names.")

    def _known(self, claims: Mapping[str, Any], organization_id: str, create: bool) -> User:
        """The user of a subject: the one bound to it, or one of the same address, who is bound to it now."""
        issuer, subject = str(claims["iss"]), str(claims["sub"])
        mine = (subjects.c.issuer == issuer) & (subjects.c.subject == subject)
        query = sa.select(users).join(subjects, subjects.c.user_id == users.c.id).where(mine)
        with self.db.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is not None:
            return user_of(row)
        email, name = _email(claims), str(claims.get("name", ""))[:200]
        user = self.invites.accept(email, name, organization_id)
        with write(self.db) as connection:
            # Who was removed here comes back only if somebody adds or invites the address again; a refusal
            # below undoes this, so the note of it stays.
            was_removed = connection.execute(subjects.delete().where(mine)).rowcount > 0
            if user is None and create and not was_removed:
                user = self.users.add_in(
                    connection, email, Role.READER, ACTOR, name=name, organization_id=organization_id
                )
            if user is None:
                raise AuthError(f"{email} is no user here.", hint="Ask an administrator for an invitation.")
            taken = (subjects.c.user_id == user.id) & (subjects.c.issuer == issuer)
            if connection.execute(sa.select(subjects.c.subject).where(taken)).first() is not None:
                raise AuthError(f"{email} belongs to another account of the provider.")
            connection.execute(subjects.insert().values(issuer=issuer, subject=subject, user_id=user.id))
            return user

    def _follow(self, settings: SignInSettings, user: User, granted: Granted) -> None:
        """Make role and places those that the provider gives; projects that are not named stay as they are."""
        organization_id = user.organization_id
        if user.role is not granted.role:
            self.users.set_role(user.id, granted.role, ACTOR, organization_id)
        tenants = Tenants(self.db)
        for name in settings.projects:
            project = tenants.project(name, organization_id)
            role = granted.projects.get(name)
            try:
                now = self.users.member(project.id, user.id, organization_id).role
            except NotFoundError:
                now = None
            if role is None and now is not None:
                self.users.leave(project.id, user.id, ACTOR, organization_id)
            elif role is not None and role is not now:
                self.users.join(project.id, user.id, role, ACTOR, organization_id)


def _email(claims: Mapping[str, Any]) -> str:
    """The address, which the provider must not call unverified; Entra ID puts it into preferred_username."""
    email = claims.get("email") or claims.get("preferred_username")
    if not isinstance(email, str) or claims.get("email_verified") is False:
        raise AuthError("The provider names no verified e-mail address.")
    return checked_email(email)


def _user(connection: Connection, user_id: str) -> User:
    row = connection.execute(sa.select(users).where(users.c.id == user_id)).one_or_none()
    if row is None:
        raise AuthError("The user is gone.")
    return user_of(row)


def _places(user: User) -> sa.Select[Any]:
    """Open projects: an owner's are all of the organization."""
    mine = (projects.c.organization_id == user.organization_id) & (projects.c.archived_at.is_(None))
    query = sa.select(projects).where(mine).order_by(projects.c.created_at, projects.c.id)
    if user.role is Role.OWNER:
        return query
    return query.join(project_users, project_users.c.project_id == projects.c.id).where(
        project_users.c.user_id == user.id
    )
