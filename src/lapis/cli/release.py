"""`lapis release`: create, approve, retire and show releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.home import Home
    from lapis.release.registry import Registry
    from lapis.release.release import Release


@click.group()
def group() -> None:
    """Create, approve, retire and show releases."""


@group.command()
@click.argument("name")
@click.option("--run", "run_id", help="Of the last checkpoint of this training run.")
@click.option("--model", help="Of a model folder, or of a model by its name.")
@json_option
def create(name: str, run_id: str | None, model: str | None, as_json: bool) -> None:
    """Keep a verified copy of a model as the next version of the release NAME."""
    if (run_id is None) == (model is None):
        raise click.UsageError("Give either --run RUN or --model FOLDER_OR_NAME.")
    from lapis.audit import os_user
    from lapis.home import Home

    home = Home.default()
    registry = _registry(home)
    if run_id is not None:
        from lapis.train.export import exported_run

        with exported_run(home, run_id) as run:
            made = registry.create(name, run.folder, run_id, run.report, os_user(), run.lineage)
    else:
        made = registry.create(name, _model_folder(registry, str(model)), None, None, os_user())
    _print(made, as_json, f"Next: lapis release approve {made.id}")


@group.command()
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--force", is_flag=True, help="Override the gates that refuse; needs --reason.")
@click.option("--reason", default="", help="Why; recorded with the release and in the audit log.")
@json_option
def approve(reference: str, force: bool, reason: str, as_json: bool) -> None:
    """Vouch for a release, so that it may be served."""
    from lapis.audit import os_user
    from lapis.home import Home

    made = _registry(Home.default()).approve(reference, os_user(), force, reason)
    _print(made, as_json, f"Next: lapis serve {made.name}")


@group.command()
@click.argument("reference", metavar="NAME[:VERSION]")
@click.option("--reason", default="", help="Why; recorded with the release and in the audit log.")
@json_option
def retire(reference: str, reason: str, as_json: bool) -> None:
    """Serve a release no more. Its weights and its record stay."""
    from lapis.audit import os_user
    from lapis.home import Home

    _print(_registry(Home.default()).retire(reference, os_user(), reason), as_json)


@group.command()
@click.argument("reference", metavar="[NAME[:VERSION]]", required=False)
@json_option
def show(reference: str | None, as_json: bool) -> None:
    """List all releases, or tell everything of one and what its gates say."""
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
    rows: list[tuple[str, object]] = [("release", release.id), ("state", release.state.value)]
    rows += [(key, value) for key, value in _facts(release).items() if isinstance(value, str) and value]
    rows += [(f"lineage {key}", _line(value)) for key, value in asdict(release.lineage).items() if value]
    rows += [(f"gate {gate.name}", f"{gate.verdict}: {gate.text}") for gate in gates]
    print_table(("fact", "value"), [row for at, row in enumerate(rows) if row not in rows[:at]])


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
    print_table(("release", "state", "digest", "bits per byte", "run", "created by", "reason"), rows)


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {count:,}" for key, count in value.items())
    return str(value)
