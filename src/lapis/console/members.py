"""Keys and members: the page of an organization's keys, projects and people."""

from __future__ import annotations

from lapis.console.keys import Keys
from lapis.console.people import People
from lapis.console.projects import Projects
from lapis.console.view import View
from lapis.tenants.tenant import Scope


async def show(view: View) -> None:
    """Draw the page. Projects and people are for administrators of the organization."""
    sections: list[Keys | Projects | People] = [Keys(view)]
    if view.may(Scope.ADMIN):
        sections += [Projects(view), People(view)]

    async def look() -> None:
        for section in sections:
            await section.look()

    await view.repeat(look)
