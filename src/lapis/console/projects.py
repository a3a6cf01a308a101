"""Projects of an organization: make, limit, archive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from nicegui import ui

from lapis.console.field import Field
from lapis.console.parts import Text, button, confirm, dialog
from lapis.console.table import Act, Cell, Column, Row, Table
from lapis.console.view import View, when
from lapis.errors import LapisError
from lapis.tenants.keys import Identity
from lapis.tenants.quota import NANO, Consumption, Quota
from lapis.tenants.tenant import DEFAULT, Project, Scope, Tenants
from lapis.tenants.usage import UsageLedger

PROJECTS = (
    Column("name", "Project"),
    Column("state", "State"),
    Column("limits", "Limits"),
    Column("day", "Tokens today", "number"),
    Column("month", "Spent this month", "number"),
    Column("created", "Created (UTC)", "time"),
    Column("id", "Id", "id"),
)
LIMIT, ARCHIVE = Act("limit", "Limits"), Act("archive", "Archive", danger=True)
LIMITS = {  # as people say it, and by how much of the stored unit one of the shown units is
    "requests_per_minute": ("Requests per minute", 1),
    "requests_per_day": ("Requests per day", 1),
    "tokens_per_minute": ("Tokens per minute", 1),
    "tokens_per_day": ("Tokens per day", 1),
    "concurrent_requests": ("Concurrent requests", 1),
    "batch_tokens_per_day": ("Batch tokens per day", 1),
    "spend_per_month": ("Money per month", 100),
    "gpu_seconds_per_month": ("GPU hours per month", 3600),
    "storage_bytes": ("Storage in MB", 10**6),
}


class Projects:
    """The section of projects."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.table = Table("Projects", PROJECTS, "No project yet.", on_act=self._act)
        with self.table.beside():
            button("Create a project", self._create)

    async def look(self) -> None:
        """Show the projects as they are now."""
        found = await asyncio.to_thread(self._used)
        self.table.fill([_row(project, used) for project, used in found])

    def _used(self) -> list[tuple[Project, Consumption]]:
        tenants, ledger = Tenants(self.view.services.db), UsageLedger(self.view.services.db)
        projects = tenants.projects(self.view.identity.organization_id)
        return [(project, ledger.consumption(project.id)) for project in projects]

    def _create(self) -> None:
        with dialog("Create a project") as opened:
            name = Field("Name")

            def make(identity: Identity) -> Project:
                tenants = Tenants(self.view.services.db)
                return tenants.create_project(name.text, self.view.session.actor(), identity.organization_id)

            async def go() -> None:
                opened.close()
                await self._do(make, f"The project {name.text!r} is there.")

            with ui.element("div").classes("row"):
                button("Create", go, "main")
                button("Not now", opened.close)

    async def _act(self, act: str, project_id: str) -> None:
        if act == "limit":
            await self._limit(project_id)
            return

        def archive(identity: Identity) -> Project:
            tenants = Tenants(self.view.services.db)
            return tenants.archive(project_id, self.view.session.actor(), identity.organization_id)

        confirm(
            "Archive this project?",
            "Its keys open nothing from the next request on, and that cannot be taken back. Its records stay.",
            "Archive it",
            lambda: self._do(archive, "The project is archived."),
        )

    async def _limit(self, project_id: str) -> None:
        tenants, organization = Tenants(self.view.services.db), self.view.identity.organization_id
        try:
            project = await asyncio.to_thread(tenants.project, project_id, organization)
        except LapisError as error:
            self.view.complain(error)
            return
        stored = asdict(project.quota)
        with dialog(f"Limits of {project.name}") as opened:
            Text("They hold from the next request on. An empty field is no limit.", "p")
            with ui.element("div").classes("form"):
                fields = {
                    name: Field(label, "number", _shown(stored[name], unit), min=0, step="any")
                    for name, (label, unit) in LIMITS.items()
                }

            def limit(identity: Identity) -> Project:
                values = {name: _stored(fields[name].number(0), unit) for name, (_, unit) in LIMITS.items()}
                actor = self.view.session.actor()
                return tenants.set_quota(project_id, Quota(**values), actor, identity.organization_id)

            async def go() -> None:
                opened.close()
                await self._do(limit, f"The limits of {project.name} are set.")

            with ui.element("div").classes("row"):
                button("Set", go, "main")
                button("Not now", opened.close)

    async def _do(self, work: Callable[[Identity], Project], said: str) -> None:
        if await self.view.act(Scope.ADMIN, work, said) is not None:
            await self.look()


def _row(project: Project, used: Consumption) -> Row:
    limits = [
        f"{label.lower()} {value / unit:,.10g}"
        for name, (label, unit) in LIMITS.items()
        if (value := getattr(project.quota, name)) is not None
    ]
    archived = project.archived_at is not None
    cells = {
        "name": project.name,
        "state": Cell("archived", tone="idle") if archived else Cell("open", tone="good"),
        "limits": ", ".join(limits) or "none",
        "day": used.tokens_day,
        "month": Cell(f"{used.spend_month / NANO:,.2f}", value=used.spend_month),
        "created": when(project.created_at),
        "id": project.id,
    }
    acts = () if archived else (LIMIT,) if project.id == DEFAULT else (LIMIT, ARCHIVE)
    return Row(project.id, cells, acts)


def _shown(value: int | None, unit: int) -> str:
    return "" if value is None else f"{value / unit:.10g}"


def _stored(value: float | None, unit: int) -> int | None:
    return None if value is None else round(value * unit)
