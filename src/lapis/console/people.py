"""People of an organization: users and their roles, invitations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from nicegui import ui

from lapis.console.field import Field
from lapis.console.parts import Text, button, confirm, dialog
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.view import View, when
from lapis.gateway.organization import Directory
from lapis.tenants.invites import Invite, Invites
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Project, Role, Scope, Tenants
from lapis.tenants.users import User, Users

SHOWN = 500
USERS = (
    Column("email", "Person"),
    Column("name", "Name"),
    Column("role", "Role"),
    Column("since", "Since (UTC)", "time"),
)
INVITES = (
    Column("email", "Invited"),
    Column("role", "As"),
    Column("projects", "With projects"),
    Column("state", "State"),
    Column("until", "Until (UTC)", "time"),
)
TONES: dict[str, Tone] = {"accepted": "good", "pending": "busy", "expired": "idle"}
ROLES = {
    Role.READER.value: "reader: works in projects that they are in",
    Role.OWNER.value: "owner: administrates the organization",
}
PLACES = {Role.MEMBER.value: "member", Role.OWNER.value: "owner"}
MAKE_OWNER, MAKE_READER = Act("owner", "Make owner"), Act("reader", "Make reader")
REMOVE, WITHDRAW = Act("remove", "Remove", danger=True), Act("withdraw", "Take back", danger=True)


class People:
    """The sections of users and invitations."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.users = Table(
            "People", USERS, "Nobody yet: who signs in with a key needs no account.", on_act=self._act
        )
        empty = "No invitation. Invite somebody here, or with"
        self.invites = Table(
            "Invitations", INVITES, empty, "client.admin.organization.invites.create", on_act=self._withdraw
        )
        with self.invites.beside():
            button("Invite somebody", self._invite)

    async def look(self) -> None:
        """Show people and invitations as they are now."""
        directory = Directory(self.view.services.db, self.view.identity.organization_id)
        people, _ = await asyncio.to_thread(directory.users, (), None, SHOWN)
        self.users.fill([_user(user) for user in people])
        invited, _ = await asyncio.to_thread(directory.invites, None, SHOWN)
        projects = await asyncio.to_thread(self._projects)
        names = {project.id: project.name for project in projects}
        self.invites.fill([_invited(invite, names) for invite in invited])

    def _projects(self) -> list[Project]:
        found = Tenants(self.view.services.db).projects(self.view.identity.organization_id)
        return [project for project in found if project.archived_at is None]

    async def _invite(self) -> None:
        projects = {
            "": "no project",
            **{item.id: item.name for item in await asyncio.to_thread(self._projects)},
        }
        with dialog("Invite somebody") as opened:
            Text("No mail is sent: whoever signs in with this address accepts.", "p")
            email = Field("E-mail address")
            role = Field("Role", "select", Role.READER.value, options=ROLES)
            project = Field("Project", "select", "", options=projects)
            place = Field("As", "select", Role.MEMBER.value, options=PLACES)

            def make(identity: Identity) -> Invite:
                places = {str(project.value): str(place.value)} if project.value else {}
                return Invites(self.view.services.db).create(
                    email.text,
                    Role(role.value),
                    self.view.session.actor(),
                    organization_id=identity.organization_id,
                    places=places,
                )

            async def go() -> None:
                opened.close()
                await self._do(make, f"{email.text} is invited.")

            with ui.element("div").classes("row"):
                button("Invite", go, "main")
                button("Not now", opened.close)

    async def _act(self, act: str, user_id: str) -> None:
        store, actor = Users(self.view.services.db), self.view.session.actor

        def change(identity: Identity) -> User:
            return store.set_role(user_id, Role(act), actor(), identity.organization_id)

        def remove(identity: Identity) -> bool:
            store.remove(user_id, actor(), identity.organization_id)
            return True

        if act == "remove":
            confirm(
                "Remove this person?",
                "The person's keys open nothing from the next request on. What was made stays.",
                "Remove",
                lambda: self._do(remove, "The person is removed."),
            )
            return
        await self._do(change, f"The person is {act} now.")

    def _withdraw(self, _: str, invite_id: str) -> None:
        def withdraw(identity: Identity) -> bool:
            actor = self.view.session.actor()
            Invites(self.view.services.db).delete(invite_id, actor, identity.organization_id)
            return True

        confirm(
            "Take this invitation back?",
            "Whoever has it cannot accept it any more.",
            "Take it back",
            lambda: self._do(withdraw, "The invitation is taken back."),
        )

    async def _do(self, work: Callable[[Identity], Any], said: str) -> None:
        if await self.view.act(Scope.ADMIN, work, said) is not None:
            await self.look()


def _user(user: User) -> Row:
    cells = {
        "email": Cell(user.email, hint=user.id),
        "name": user.name,
        "role": user.role.value,
        "since": when(user.created_at),
    }
    return Row(user.id, cells, (MAKE_READER if user.role is Role.OWNER else MAKE_OWNER, REMOVE))


def _invited(invite: Invite, names: dict[str, str]) -> Row:
    state = invite.status(time.time())
    cells = {
        "email": Cell(invite.email, hint=invite.id),
        "role": invite.role.value,
        "projects": ", ".join(f"{names.get(name, name)} ({role})" for name, role in invite.projects.items()),
        "state": Cell(state, tone=TONES[state]),
        "until": when(invite.expires_at),
    }
    return Row(invite.id, cells, () if state == "accepted" else (WITHDRAW,))
