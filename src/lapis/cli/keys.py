"""`lapis keys`: create, list and revoke API keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.tenants.keys import ApiKey, ApiKeys

DAY = 86_400


@click.group()
def group() -> None:
    """Create, list and revoke API keys."""


@group.command()
@click.argument("name")
@click.option("--project", default="default", show_default=True, help="Which project pays.")
@click.option(
    "--expires-days",
    type=click.FloatRange(min=0, min_open=True, max=36_500),
    help="Valid for so long; else for good.",
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    help="models.read, models.use, admin; repeatable. [default: both models.*]",
)
@json_option
def create(
    name: str, project: str, expires_days: float | None, scopes: tuple[str, ...], as_json: bool
) -> None:
    """Make a key and print it, this once."""
    from lapis.audit import os_user
    from lapis.tenants.tenant import Role

    expires_at = None if expires_days is None else time.time() + expires_days * DAY
    key, text = _keys().create(
        name, os_user(), project=project, scopes=scopes or Role.MEMBER.scopes, expires_at=expires_at
    )
    if as_json:
        print_json({**_facts(key), "key": text})
        return
    say(text)
    say(f"Keep it now: it is shown only this once. Revoke it with: lapis keys revoke {key.prefix}")


@group.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List all keys, without their secrets."""
    keys = _keys().list()
    if as_json:
        print_json([_facts(key) for key in keys])
        return
    rows = [
        (
            key.prefix,
            key.name,
            key.project_id,
            key.state(time.time()),
            " ".join(sorted(key.scopes)),
            _day(key.created_at),
            _day(key.expires_at),
        )
        for key in keys
    ]
    print_table(("prefix", "name", "project", "state", "scopes", "created", "expires"), rows)


@group.command()
@click.argument("prefix")
@json_option
def revoke(prefix: str, as_json: bool) -> None:
    """Refuse the key with this PREFIX from now on."""
    from lapis.audit import os_user

    key = _keys().revoke(prefix, os_user())
    if as_json:
        print_json(_facts(key))
    else:
        say(f"The key {key.prefix} ({key.name}) is revoked.")


def _keys() -> ApiKeys:
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.keys import ApiKeys

    return ApiKeys(open_database(Home.default().database_url))


def _facts(key: ApiKey) -> dict[str, Any]:
    return {**vars(key), "scopes": sorted(key.scopes), "state": key.state(time.time())}


def _day(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
