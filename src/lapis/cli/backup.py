"""`lapis backup`: the whole state of an installation in one file."""

from __future__ import annotations

from pathlib import Path

import click

from lapis.cli.output import json_option, print_json, say


@click.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--without",
    "left_out",
    multiple=True,
    type=click.Choice(["data", "runs", "models"]),
    help="Leave out what is large and can be made or fetched again; repeatable.",
)
@json_option
def command(file: Path, left_out: tuple[str, ...], as_json: bool) -> None:
    """Write the whole state of this installation into FILE: the database and all files of the home.

    It may run while servers and trainings go on: the database is that of one moment, with all files that it
    refers to. FILE is complete or not there, and a backup of SQLite can be restored into PostgreSQL and back.
    It holds digests of keys, not keys; keep it as you keep the home.
    """
    from lapis.backup.backup import make_backup
    from lapis.home import Home
    from lapis.log import progress

    with progress("Backup", "files") as report:
        made = make_backup(Home.default(), file, tuple(sorted(set(left_out))), progress=report)
    facts = {
        "file": click.format_filename(file),
        "bytes": made.bytes,
        "rows": sum(made.rows.values()),
        "files": len(made.members) - len(made.rows),
        "left_out": list(made.left_out),
    }
    if as_json:
        print_json(facts)
        return
    say(f"{facts['file']}: {facts['rows']:,} rows, {facts['files']:,} files, {made.bytes / 1e6:,.1f} MB.")
    say(f"Put it back with: lapis restore {facts['file']}")
