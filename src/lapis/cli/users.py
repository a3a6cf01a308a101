"""`lapis users`: the people of the organization."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lapis.cli.output import json_option, print_json, print_table, say
from lapis.errors import NotFoundError, nearest

if TYPE_CHECKING:
    from lapis.tenants.users import User, Users


@click.group()
def group() -> None:
    """Add, list and remove users."""


@group.command()
@click.argument("email")
@click.option(
    "--role",
    type=click.Choice(["owner", "reader"]),
    default="reader",
    show_default=True,
    help="An owner administrates the organization.",
)
@click.option("--name", default="", help="How the person is called.")
@click.option("--project", "projects", multiple=True, help="Where the person is a member; repeatable.")
@json_option
def add(email: str, role: str, name: str, projects: tuple[str, ...], as_json: bool) -> None:
    """Add the person with this EMAIL address."""
    from lapis.audit import os_user
    from lapis.db import write
    from lapis.tenants.tenant import DEFAULT, Role, Tenants

    users = _users()
    places = [Tenants(users.db).project(project).id for project in projects]
    # In one transaction: a person who may not have one of the places is not added either.
    with write(users.db) as connection:
        made = users.add_in(connection, email, Role(role), os_user(), name=name, organization_id=DEFAULT)
        for place in places:
            users.join_in(connection, place, made.id, Role.MEMBER, os_user(), DEFAULT)
    if as_json:
        print_json(asdict(made))
    else:
        say(f"{made.id}  {made.email}  {made.role}")


@group.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List all users."""
    found = _users().list()
    if as_json:
        print_json([asdict(user) for user in found])
        return
    print_table(
        ("id", "email", "name", "role"),
        [(user.id, user.email, user.name, user.role.value) for user in found],
        "There are no users yet. Add one: lapis users add EMAIL",
    )


@group.command()
@click.argument("user")
@json_option
def remove(user: str, as_json: bool) -> None:
    """Remove a USER (address or id): the person's keys open nothing any more."""
    from lapis.audit import os_user

    users = _users()
    found = _find(users, user)
    users.remove(found.id, os_user())
    if as_json:
        print_json(asdict(found))
    else:
        say(f"{found.email} is removed.")


def _find(users: Users, user: str) -> User:
    known = users.list()
    for one in known:
        if user in (one.id, one.email):
            return one
    raise NotFoundError(
        f"There is no user {user!r}. {nearest(user, (one.email for one in known))}".rstrip(),
        hint="lapis users list",
    )


def _users() -> Users:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.users import Users

    return Users(open_database(Home.default().database_url))
