"""`lapis projects`: the projects of the organization."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.tenants.tenant import Project, Tenants


def _limit(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A whole number, or `none`."""
    text = None if value is None else value.replace("_", "")
    if text is None or text == "none" or (text.isascii() and text.isdigit()):
        return text
    raise click.BadParameter(f"{value!r} is neither a whole number nor 'none'.")


@click.group()
def group() -> None:
    """Create, list, limit and archive projects."""


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


@group.command()
@click.argument("project")
@click.option("--model", help="Of this model only.")
@click.option("--requests-per-minute", callback=_limit, help="Requests in a UTC minute.")
@click.option("--tokens-per-minute", callback=_limit, help="Tokens in a UTC minute.")
@click.option("--requests-per-day", callback=_limit, help="Requests in a UTC day.")
@click.option("--tokens-per-day", callback=_limit, help="Tokens in a UTC day.")
@click.option("--concurrent-requests", callback=_limit, help="Requests at once.")
@click.option("--batch-tokens-per-day", callback=_limit, help="Prompt tokens of batches in a UTC day.")
@click.option("--spend-per-month", callback=_limit, help="Cents in a UTC month; needs a price list.")
@click.option("--gpu-seconds-per-month", callback=_limit, help="GPU time of jobs in a UTC month.")
@click.option("--storage-bytes", callback=_limit, help="Bytes of files.")
@json_option
def limit(project: str, model: str | None, as_json: bool, **given: str | None) -> None:
    """Limit a PROJECT (its name or id): those limits that are given, a number or `none`; then tell them all."""
    from lapis.audit import os_user
    from lapis.tenants.limits import Limits
    from lapis.tenants.quota import Quota

    tenants = _tenants()
    found = tenants.project(project)
    limits = Limits(tenants.db)
    changes = {
        name: None if text == "none" else int(text) for name, text in given.items() if text is not None
    }
    quota = found.quota if model is None else limits.models(found.id).get(model, Quota())
    if changes:
        quota = replace(quota, **changes)
        if model is None:
            tenants.set_quota(found.id, quota, os_user())
        else:
            limits.set_model(found.id, model, quota, os_user())
    if as_json:
        print_json({"project": found.id, "model": model, **asdict(quota)})
        return
    rows = [(name.replace("_", " "), value) for name, value in asdict(quota).items() if value is not None]
    print_table(("limit", "most"), rows, "It has no limits.")


def _tenants() -> Tenants:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.tenant import Tenants

    return Tenants(open_database(Home.default().database_url))


def _facts(project: Project) -> dict[str, Any]:
    return {**asdict(project), "status": "active" if project.archived_at is None else "archived"}
