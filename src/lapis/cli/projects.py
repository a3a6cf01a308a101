"""`lapis projects`: the projects of the organization."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.tenants.tenant import Project, Tenants


@click.group()
def group() -> None:
    """Create, list and archive projects."""


@group.command()
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Add a project; keys, files, jobs, limits and usage belong to one."""
    from lapis.audit import os_user

    made = _tenants().create_project(name, os_user())
    if as_json:
        print_json(_facts(made))
    else:
        say(f"{made.id}  {made.name}")
        say(f"A key for it: lapis keys create NAME --project {made.name!r}")


@group.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List all projects, archived ones too."""
    found = _tenants().projects()
    if as_json:
        print_json([_facts(project) for project in found])
        return
    rows = [(project.id, project.name, _facts(project)["status"]) for project in found]
    print_table(("id", "name", "status"), rows)


@group.command()
@click.argument("project")
@json_option
def archive(project: str, as_json: bool) -> None:
    """Close a PROJECT (its name or id) for good: its keys open nothing any more, its records stay."""
    from lapis.audit import os_user

    closed = _tenants().archive(project, os_user())
    if as_json:
        print_json(_facts(closed))
    else:
        say(f"The project {closed.name} ({closed.id}) is archived.")


def _tenants() -> Tenants:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.tenant import Tenants

    return Tenants(open_database(Home.default().database_url))


def _facts(project: Project) -> dict[str, Any]:
    return {**asdict(project), "status": "active" if project.archived_at is None else "archived"}
