"""`lapis release`: create, approve, retire and show releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import fact, json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.home import Home
    from lapis.release.registry import Registry
    from lapis.release.release import Release


@click.group()
def group() -> None:
    """Create, approve, retire and show releases."""


@group.command()
@click.argument("name")
@click.option(
    "--run", "run_id", help="From the last checkpoint of this run: its id, the beginning of one, or `last`."
)
@click.option("--model", help="From a model folder, or a pulled model by its name.")
@click.option(
    "--average", is_flag=True, help="The average of the run's weights (train.ema), not the last ones."
)
@click.option(
    "--best", is_flag=True, help="The run's checkpoint of the lowest held-out loss, not the last one."
)
@json_option
def create(
    name: str, run_id: str | None, model: str | None, average: bool, best: bool, as_json: bool
) -> None:
    """Keep a model as the next version of NAME.

    Its files are copied and verified. A run brings its evaluation with it.
    """
    if (run_id is None) == (model is None):
        raise click.UsageError("Give either --run RUN or --model FOLDER_OR_NAME.")
    if (average or best) and run_id is None:
        raise click.UsageError("--average and --best are for runs: give --run RUN.")
    from lapis.audit import os_user
    from lapis.home import Home
    from lapis.log import progress

    home = Home.default()
    registry = _registry(home)
    with progress("release") as shown:
        if run_id is not None:
            from lapis.train.export import exported_run

            with exported_run(
                home, run_id, average=average, best=best
            ) as run:  # its id in full: what was typed may be `last`
                known = run.lineage["run"]
                made = registry.create(name, run.folder, known, run.report, os_user(), run.lineage, shown)
        else:
            folder = _model_folder(registry, str(model))
            made = registry.create(name, folder, None, None, os_user(), progress=shown)
    measure = "" if made.report else f"lapis evaluate {made.id} --data DATASET, then "
    _print(made, as_json, f"Next: {measure}lapis release approve {made.id}")


@group.command()
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--force", is_flag=True, help="Override the gates that refuse; needs --reason.")
@click.option("--reason", default="", help="Why; recorded with the release and in the audit log.")
@json_option
def approve(reference: str, force: bool, reason: str, as_json: bool) -> None:
    """Vouch for a release: it may be served."""
    from lapis.audit import os_user
    from lapis.home import Home

    made = _registry(Home.default()).approve(reference, os_user(), force, reason)
    _print(made, as_json, f"Next: lapis serve {made.name}")


@group.command()
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--reason", default="", help="Why; recorded in the audit log.")
@json_option
def retire(reference: str, reason: str, as_json: bool) -> None:
    """Serve a release no more; its record stays."""
    from lapis.audit import os_user
    from lapis.home import Home

    _print(_registry(Home.default()).retire(reference, os_user(), reason), as_json)


@group.command()
@click.argument("reference", metavar="[NAME[:VERSION]]", required=False)
@json_option
def show(reference: str | None, as_json: bool) -> None:
    """List all releases, or tell all of one."""
    from lapis.home import Home

    registry = _registry(Home.default())
    if reference is None:
        _print_all(registry.list(), as_json)
        return
    release = registry.show(reference)
    gates = registry.judge(release)
    if as_json:
        print_json({**_facts(release), "gates": [asdict(gate) for gate in gates]})
        return
    print_table(
        ("fact", "value"), [*_rows(release), *((f"gate: {g.name}", f"{g.verdict}. {g.text}") for g in gates)]
    )


def _registry(home: Home) -> Registry:
    from lapis.db import open_database
    from lapis.release.registry import Registry

    return Registry(home, open_database(home.database_url))


def _model_folder(registry: Registry, model: str) -> Path:
    """A folder if the text looks like one or names one, else the folder of a pulled model."""
    if "/" in model or Path(model).is_dir():
        return Path(model)
    return registry.store.get(model).folder


def _facts(release: Release) -> dict[str, Any]:
    return {"id": release.id, **asdict(release), "state": release.state.value, "folder": str(release.folder)}


def _print(release: Release, as_json: bool, following: str = "") -> None:
    if as_json:
        print_json(_facts(release))
        return
    say(f"{release.id} is {release.state}. Digest {release.digest[:16]}, in {release.folder}.")
    if following:
        say(following)


def _print_all(releases: Sequence[Release], as_json: bool) -> None:
    if as_json:
        print_json([_facts(release) for release in releases])
        return
    rows = [
        (
            r.id,
            r.state.value,
            r.digest[:12],
            (r.report or {}).get("bits_per_byte"),
            r.run_id,
            r.created_by,
            r.reason,
        )
        for r in releases
    ]
    columns = ("release", "state", "digest", "bits per byte", "run", "created by", "reason")
    print_table(columns, rows, "There are no releases yet. Make one: lapis release create NAME --run last")


def _rows(release: Release) -> list[tuple[str, str]]:
    """What is known of a release, fact by fact."""
    bits = (release.report or {}).get("bits_per_byte")
    facts: dict[str, object] = {
        "release": release.id,
        "state": release.state,
        "digest": release.digest,
        "folder": release.folder,
        "created": f"{datetime.fromtimestamp(release.created_at, UTC):%Y-%m-%d %H:%M} UTC by {release.created_by}",
        "approved by": release.approved_by,
        "reason": release.reason,
        "bits per byte": None if bits is None else f"{bits:.3f}",
        **asdict(release.lineage),
    }
    facts["licences"] = ", ".join(f"{name} {count:,}" for name, count in release.lineage.licences.items())
    return [(name, fact(value)) for name, value in facts.items() if value not in (None, "")]
