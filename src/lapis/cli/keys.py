"""`lapis keys`: create, list and revoke API keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.tenants.admin_keys import AdminKey, AdminKeys
    from lapis.tenants.keys import ApiKey, ApiKeys

DAY = 86_400


@click.group()
def group() -> None:
    """Create, list and revoke API keys."""


@group.command()
@click.argument("name")
@click.option("--project", help="Which project pays. [default: default]")
@click.option(
    "--expires-days",
    type=click.FloatRange(min=0, min_open=True, max=36_500),
    help="Valid for so long; else for good.",
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    help="models.read, models.use, work.read, work.write, admin; repeatable. [default: all but admin]",
)
@click.option("--admin", is_flag=True, help="A key that administrates the organization (OPENAI_ADMIN_KEY).")
@click.option(
    "--role",
    type=click.Choice(["owner", "reader"]),
    help="With --admin: whether it may change things or only look. [default: owner]",
)
@json_option
def create(
    name: str,
    project: str | None,
    expires_days: float | None,
    scopes: tuple[str, ...],
    admin: bool,
    role: str | None,
    as_json: bool,
) -> None:
    """Make a key and print it, this once."""
    from lapis.audit import os_user
    from lapis.tenants.tenant import DEFAULT, Role

    expires_at = None if expires_days is None else time.time() + expires_days * DAY
    key: ApiKey | AdminKey
    if admin:
        if scopes or project:
            raise click.UsageError("An admin key has neither --project nor --scope, but a --role.")
        key, text = _admin_keys().create(
            name, os_user(), role=Role(role or Role.OWNER), expires_at=expires_at
        )
    elif role:
        raise click.UsageError("Only a key made with --admin has a --role.")
    else:
        key, text = _keys().create(
            name,
            os_user(),
            project=project or DEFAULT,
            scopes=scopes or Role.MEMBER.scopes,
            expires_at=expires_at,
        )
    if as_json:
        print_json({**_facts(key), "key": text})
        return
    say(text)
    say(f"Keep it now: it is shown only this once. Revoke it with: lapis keys revoke {key.prefix}")


@group.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List all keys, those of projects and admin keys, without their secrets."""
    found: list[ApiKey | AdminKey] = [*_keys().list(), *_admin_keys().list()]
    facts = [_facts(key) for key in found]
    if as_json:
        print_json(facts)
        return
    rows = [
        (
            key.prefix,
            key.name,
            fact.get("project_id", "all"),
            fact["state"],
            " ".join(fact["scopes"]),
            _day(key.created_at),
            _day(key.last_used_at),
            _day(key.expires_at),
        )
        for key, fact in zip(found, facts, strict=True)
    ]
    print_table(
        ("prefix", "name", "project", "state", "scopes", "created", "used", "expires"), rows,
        "There are no keys yet. Make one: lapis keys create NAME",
    )  # fmt: skip


@group.command()
@click.argument("prefix")
@json_option
def revoke(prefix: str, as_json: bool) -> None:
    """Refuse the key with this PREFIX from now on."""
    from lapis.audit import os_user

    keys: AdminKeys | ApiKeys = _admin_keys()
    if all(prefix not in (key.id, key.prefix, f"lapis_admin_{key.prefix}") for key in keys.list()):
        keys = _keys()
    key = keys.revoke(prefix, os_user())
    if as_json:
        print_json(_facts(key))
    else:
        say(f"The key {key.prefix} ({key.name}) is revoked.")


def _keys() -> ApiKeys:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.keys import ApiKeys

    return ApiKeys(open_database(Home.default().database_url))


def _admin_keys() -> AdminKeys:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.admin_keys import AdminKeys

    return AdminKeys(open_database(Home.default().database_url))


def _facts(key: ApiKey | AdminKey) -> dict[str, Any]:
    """What is told of a key; an admin key's one scope is its role over the organization."""
    facts = dict(vars(key))
    scopes = facts.get("scopes", [f"organization.{facts.get('role')}"])
    return {**facts, "scopes": sorted(scopes), "state": key.state(time.time())}


def _day(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
