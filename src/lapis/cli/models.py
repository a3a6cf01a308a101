"""`lapis models`: list, show, pull, export and remove models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli import pull
from lapis.cli.output import fact, json_option, print_json, print_table, say
from lapis.errors import LapisError, NotFoundError

if TYPE_CHECKING:
    from lapis.home import Home
    from lapis.model.store import StoredModel
    from lapis.release.registry import Registry


@click.group()
def group() -> None:
    """List, show, pull, export and remove models."""


group.add_command(pull.command, "pull")


@group.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models on this machine: pulled ones and releases."""
    from lapis.home import Home
    from lapis.model.store import ModelStore, open_folder

    home = Home.default()
    store = ModelStore(home)
    rows = [_row(model, "pulled", "") for model in store.list()]
    damage = list(store.damaged())
    for release in _registry(home).list():
        try:
            rows.append(_row(open_folder(release.id, release.folder), "release", release.state.value))
        except LapisError as error:
            damage.append(error)
    for bad in damage:
        click.echo(f"warning: {bad}", err=True)
    if as_json:
        print_json(rows)
    elif rows:
        short = {"digest": 12, "source": 40}
        table = [[str(row[key])[: short[key]] if key in short else row[key] for key in row] for row in rows]
        print_table(tuple(rows[0]), table)
    else:
        say("There are no models yet. Fetch one: lapis pull smollm2-135m-instruct")


@group.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Tell everything about a model (or a release NAME:VERSION); its files are verified."""
    from lapis.home import Home
    from lapis.log import progress
    from lapis.model import manifest

    model = _find(Home.default(), name)
    with progress("verify") as report:
        manifest.verify(model.folder, report)
    told = facts(model)
    if as_json:
        print_json(told)
        return
    nested = ("source", "config", "files")
    rows = [(key, fact(value)) for key, value in told.items() if key not in nested]
    rows += [(f"source {key}", fact(value)) for key, value in told["source"].items()]
    rows += [(f"config {key}", fact(value)) for key, value in told["config"].items()]
    rows += [
        (file, f"{entry['bytes']:,} bytes, sha256 {entry['sha256']}") for file, entry in told["files"].items()
    ]
    print_table(("fact", "value"), rows)


@group.command()
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--adapter", is_flag=True, help="Of a run with [lora]: the adapter alone, in PEFT's format.")
@click.option(
    "--gguf",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="One GGUF file, its matrices stored so, for llama.cpp and its kin.",
)
@click.option(
    "--best", is_flag=True, help="Of a run: its checkpoint of the lowest held-out loss, not the last."
)
@json_option
def export(name: str, destination: Path, adapter: bool, gguf: str | None, best: bool, as_json: bool) -> None:
    """Write a model, a release NAME:VERSION or a run as a plain Hugging Face folder, verified.

    A run's adapter is merged into its base model unless --adapter is given.
    """
    from lapis.home import Home
    from lapis.log import progress
    from lapis.model.manifest import copy_folder

    home = Home.default()
    if adapter and gguf:
        raise click.UsageError("--adapter and --gguf exclude each other: a GGUF file holds a whole model.")
    if adapter:
        _export_adapter(home, name, destination, best, as_json)
        return
    if gguf:
        _export_gguf(home, name, destination, gguf, best, as_json)
        return
    with progress("export") as report, _folder_of(home, name, best) as folder:
        manifest = copy_folder(folder, destination, sealed=False, progress=report)
    if as_json:
        print_json(
            {
                "name": name,
                "folder": str(destination),
                "digest": manifest.digest,
                "files": list(manifest.files),
            }
        )
        return
    say(f"{name} is in {destination}: {', '.join(manifest.files)}, all verified.")


@group.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def remove(name: str, yes: bool, as_json: bool) -> None:
    """Delete a pulled model. Releases are not deleted but retired: lapis release retire."""
    from lapis.home import Home
    from lapis.model.store import ModelStore

    home = Home.default()
    store = ModelStore(home)
    try:
        folder = store.find(name)
    except NotFoundError as missing:
        if any(name in (release.name, release.id) for release in _registry(home).list()):
            raise NotFoundError(f"{name!r} is a release.", hint=f"lapis release retire {name}") from missing
        raise
    if not yes:
        _confirm(f"Delete {folder}?")
    store.remove(name)
    if as_json:
        print_json({"name": name, "removed": True})
        return
    say(f"{name} is removed.")


def _confirm(question: str) -> None:
    """Ask at the terminal. Raises click.Abort after a no, UsageError where nobody answers."""
    try:
        sure = click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError("Nobody answers here: --yes deletes without a question.") from None
    if not sure:
        raise click.Abort


def facts(model: StoredModel) -> dict[str, Any]:
    """What is told of a model in JSON: name, place, digests, source, and the numbers of its configuration."""
    from lapis.model.config import as_facts

    config = None if model.base is not None else model.config
    return {
        "name": model.name,
        "folder": str(model.folder),
        "digest": model.digest,
        "licence": model.licence,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "base": model.base,
        "weight_bytes": model.bytes if config is None else config.weight_bytes,
        "kv_bytes_per_token": None if config is None else config.kv_bytes_per_token,
        "add_bos": model.manifest.add_bos,
        "bos_id": model.manifest.bos_id,
        "stop_ids": list(model.manifest.stop_ids),
        "source": asdict(model.source),
        "config": {} if config is None else as_facts(config),
        "files": {name: asdict(entry) for name, entry in model.manifest.files.items()},
    }


def _export_adapter(home: Home, name: str, destination: Path, best: bool, as_json: bool) -> None:
    from lapis.train.export import export_adapter
    from lapis.train.run import Run

    run = Run.find(home, name)
    base = export_adapter(run, destination, best=best)
    if as_json:
        print_json({"name": run.id, "folder": str(destination), "base": base})
        return
    say(f"The adapter of {run.id} for {base} is in {destination}.")
    say(f"Next: lapis pull {destination} --name NAME   lapis serve")


def _export_gguf(home: Home, name: str, destination: Path, kind: str, best: bool, as_json: bool) -> None:
    from lapis.log import progress
    from lapis.model.gguf_export import export_gguf

    with progress("export") as report, _folder_of(home, name, best) as folder:
        manifest = export_gguf(folder, destination, kind, report)
    size = destination.stat().st_size
    if as_json:
        told = {"name": name, "file": str(destination), "type": kind, "bytes": size}
        print_json({**told, "digest": manifest.digest})
        return
    say(f"{name} is in {destination}: {size:,} bytes, matrices in {kind}.")
    say(f"Next: llama-server -m {destination}")


@contextmanager
def _folder_of(home: Home, name: str, best: bool = False) -> Iterator[Path]:
    """The folder of a model or a release, else that of a run, written for the while. Raises NotFoundError.

    `best` is for runs alone: else it raises UsageError.
    """
    from lapis.train.run import Run

    try:
        folder = _find(home, name).folder
    except NotFoundError as missing:
        if not any(name == "last" or run.id.startswith(name) for run in Run.list(home)):
            raise missing
    else:
        if best:
            raise click.UsageError("--best is for runs: name one.")
        yield folder
        return
    from lapis.train.export import exported_run

    with exported_run(home, name, best=best) as exported:
        yield exported.folder


def _find(home: Home, name: str) -> StoredModel:
    """A pulled model, else a release by `name` or `name:version`. Raises NotFoundError."""
    from lapis.model.store import ModelStore, open_folder

    try:
        return ModelStore(home).get(name)
    except NotFoundError as missing:
        known = [release for release in _registry(home).list() if name in (release.name, release.id)]
        if not known:
            raise missing
        return open_folder(known[-1].id, known[-1].folder)


def _registry(home: Home) -> Registry:
    from lapis.db import open_database
    from lapis.release.registry import Registry

    return Registry(home, open_database(home.database_url))


def _row(model: StoredModel, kind: str, state: str) -> dict[str, object]:
    return {
        "name": model.name,
        "kind": kind,
        "state": state,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "licence": model.licence,
        "digest": model.digest,
        "source": model.source.reference,
    }
