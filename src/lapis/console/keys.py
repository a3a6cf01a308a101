"""Keys: made here and shown once, revoked at once."""

from __future__ import annotations

import asyncio
import time

from nicegui import ui

from lapis.console.field import Field
from lapis.console.parts import Text, button, confirm, copy_button, dialog
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.view import View, when
from lapis.db import write
from lapis.errors import NotFoundError
from lapis.tenants.keys import ApiKey, ApiKeys, Identity
from lapis.tenants.tenant import Role, Scope, Tenants, require_open_project

DAY = 86_400
KEYS = (
    Column("name", "Key"),
    Column("prefix", "Begins with", "id"),
    Column("state", "State"),
    Column("scopes", "May do"),
    Column("project", "Project"),
    Column("created", "Created (UTC)", "time"),
    Column("expires", "Expires (UTC)", "time"),
    Column("by", "By"),
)
TONES: dict[str, Tone] = {"active": "good", "expired": "idle", "revoked": "bad"}
REVOKE = Act("revoke", "Revoke", danger=True)


class Keys:
    """The section of keys."""

    def __init__(self, view: View) -> None:
        self.view = view
        empty, command = "No key yet. Make one here, or with", "lapis keys create NAME"
        self.table = Table("API keys", KEYS, empty, command, on_act=lambda _, key: _ask(view, key))
        if view.may(Scope.ADMIN):
            with self.table.beside():
                button("Create a key", lambda: _create(view), "main")

    async def look(self) -> None:
        """Show the keys as they are now."""
        found = await asyncio.to_thread(visible_keys, self.view)
        projects = await asyncio.to_thread(_projects, self.view)
        self.table.fill([_row(key, self.view, projects.get(key.project_id, key.project_id)) for key in found])


def visible_keys(view: View) -> list[ApiKey]:
    """The keys of the session's project, the newest first; for an administrator those of the organization."""
    services, identity = view.services, view.identity
    if Scope.ADMIN not in identity.scopes:
        return list(reversed(ApiKeys(services.db).list(identity.project_id)))
    ours = {project.id for project in Tenants(services.db).projects(identity.organization_id)}
    return [key for key in reversed(ApiKeys(services.db).list()) if key.project_id in ours]


def _projects(view: View) -> dict[str, str]:
    return {item.id: item.name for item in Tenants(view.services.db).projects(view.identity.organization_id)}


def _row(key: ApiKey, view: View, project: str) -> Row:
    state = key.state(time.time())
    own = key.id == view.identity.key_id
    cells = {
        "name": Cell(key.name + (" (yours, now)" if own else ""), hint=key.id),
        "prefix": f"lapis_{key.prefix}_…",
        "state": Cell(state, tone=TONES[state]),
        "scopes": _role(key),
        "project": Cell(project, hint=key.project_id),
        "created": when(key.created_at),
        "expires": when(key.expires_at),
        "by": key.created_by,
    }
    may = state == "active" and (own or view.may(Scope.ADMIN))
    return Row(key.id, cells, (REVOKE,) if may else ())


def _role(key: ApiKey) -> Cell:
    """The role whose scopes a key has, or the scopes."""
    scopes = ", ".join(sorted(key.scopes))
    return Cell(next((role.value for role in Role if role.scopes == key.scopes), scopes), hint=scopes)


async def _create(view: View) -> None:
    known = await asyncio.to_thread(Tenants(view.services.db).projects, view.identity.organization_id)
    projects = [project for project in known if project.archived_at is None]
    with dialog("Create a key") as opened:
        name = Field("Name", placeholder="what it is for")
        names = {item.id: item.name for item in projects}
        project = Field("Project", "select", next(iter(names), ""), options=names)
        role = Field(
            "May do", "select", Role.MEMBER.value,
            options={role.value: f"{role.value}: {', '.join(sorted(role.scopes))}" for role in Role},
        )  # fmt: skip
        days = Field("Expires after days", "number", "90", min=1, hint="Empty: never.")

        def make(identity: Identity) -> str:
            count = days.number(lowest=0.01)
            expires_at = None if count is None else time.time() + count * DAY
            found = Tenants(view.services.db).project(str(project.value), identity.organization_id)
            with write(view.services.db) as connection:
                require_open_project(connection, found.id, found.organization_id)
                return ApiKeys(view.services.db).create_in(
                    connection,
                    name.text,
                    view.session.actor(),
                    found.id,
                    scopes=Role(role.value).scopes,
                    expires_at=expires_at,
                )[1]

        async def go() -> None:
            opened.close()
            text = await view.act(Scope.ADMIN, make)
            if text is not None:
                _show_once(text)

        with ui.element("div").classes("row"):
            button("Create", go, "main")
            button("Not now", opened.close)


def _show_once(text: str) -> None:
    with dialog("Your new key") as opened:
        opened.props("persistent")
        Text("It is shown this once and kept nowhere. Copy it now.", "p")
        secret = Text(text).classes("secret")
        with ui.element("div").classes("row"):
            copy_button(secret, "Copy the key")
            button("I have it", opened.close, "main")


def _ask(view: View, key_id: str) -> None:
    def work(identity: Identity) -> ApiKey:
        if key_id != identity.key_id:
            identity.require(Scope.ADMIN)
        if key_id not in {key.id for key in visible_keys(view)}:
            raise NotFoundError(f"There is no key {key_id[:40]!r}.")
        return ApiKeys(view.services.db).revoke(key_id, view.session.actor())

    confirm(
        "Revoke this key?",
        "Whoever uses it is refused from the next request on. That cannot be taken back.",
        "Revoke it",
        lambda: view.act(Scope.MODELS_READ, work, "The key is revoked."),
    )
