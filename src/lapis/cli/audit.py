"""`lapis audit`: who did what; whether the record of it is whole."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lapis.cli.output import amount, json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.audit import AuditLog


@click.group()
def group() -> None:
    """Verify, list and export the audit log."""


@group.command()
@click.option("--head", metavar="DIGEST", help="A digest kept from before: the log must still contain it.")
@json_option
def verify(head: str | None, as_json: bool) -> None:
    """Walk the whole log; name the first entry that was edited, dropped or moved.

    Who can write to the database can rebuild the whole log, or cut off its end together with the record of
    where it ends. Keep the digest that this prints somewhere else, and give it back with --head: that shows both.
    """
    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise click.UsageError(
            f"--head {head!r} is no digest: 64 hexadecimal digits, as this command prints it."
        )
    summary = _log().verify(head)
    if as_json:
        print_json(vars(summary))
        return
    say(f"The audit log is whole: {summary.entries:,} entries.")
    say(f"Head: {summary.head}")
    if head is None:
        say("Keep the head somewhere else. Later: lapis audit verify --head DIGEST")


@group.command(name="list")
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(1, 10**9), help="The last so many."
)
@click.option("--actor", default="", help="Only those whose actor contains this text.")
@click.option("--action", default="", help="Only those whose action contains this text.")
@click.option("--target", default="", help="Only those whose target contains this text.")
@json_option
def list_(limit: int, actor: str, action: str, target: str, as_json: bool) -> None:
    """List the last entries, oldest first."""
    entries = _log().newest(limit, actor, action, target)[::-1]
    if as_json:
        print_json([vars(entry) for entry in entries])
        return
    rows = [
        (
            entry.sequence,
            datetime.fromtimestamp(entry.at, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            entry.actor,
            entry.action,
            entry.target,
            json.dumps(dict(entry.facts), ensure_ascii=False),
        )
        for entry in entries
    ]
    none = "No entry fits." if actor or action or target else "The audit log has no entries yet."
    print_table(("entry", "at (UTC)", "actor", "action", "target", "facts"), rows, none)


@group.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
def export(file: Path | None) -> None:
    """Write all entries as lines of JSON to FILE, or to standard output.

    Each line has the entry's digest and the one before it, so that the chain can be checked elsewhere.
    """
    from lapis.storage import atomic_file

    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in _log().export())
    if file is None:
        sys.stdout.writelines(lines)
        return
    with atomic_file(file) as out:
        count = sum(out.write(line.encode()) > 0 for line in lines)
    say(f"{file}: {amount(count, 'entry', 'entries')}.")


def _log() -> AuditLog:
    from lapis.audit import AuditLog
    from lapis.db import open_database
    from lapis.home import Home

    return AuditLog(open_database(Home.default().database_url))
