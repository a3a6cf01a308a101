"""`lapis restore`: a backup put back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from lapis.cli.output import json_option, print_json, say


@click.command("restore")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--force", is_flag=True, help="Replace the state that is there; it is gone then.")
@json_option
def command(file: Path, force: bool, as_json: bool) -> None:
    """Make the home (LAPIS_HOME) and its database (LAPIS_DATABASE_URL) those of the backup FILE.

    End the servers first. The whole file is checked before anything is written; a damaged one changes nothing.
    If it is killed, run the same command again. What the backup left out stays as it is.
    """
    from lapis.backup.restore import restore_backup
    from lapis.home import Home
    from lapis.log import progress

    home = Home.default()
    with progress("Restore", "files") as report:
        done = restore_backup(home, file, force, progress=report)
    at = datetime.fromtimestamp(done.made_at, UTC).strftime("%Y-%m-%d %H:%M")
    if as_json:
        print_json({"home": str(home.root), "made_at": done.made_at, "rows": sum(done.rows.values())})
        return
    say(
        f"{home.root} is as it was on {at} UTC: {sum(done.rows.values()):,} rows, {done.bytes / 1e6:,.1f} MB."
    )
    say("Check the audit log: lapis audit verify")
