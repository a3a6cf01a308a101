"""`lapis data`: prepare and inspect datasets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.data.report import Step
    from lapis.data.shards import Dataset
    from lapis.train.recipe import Recipe

SHOWN_CHARS = 300


@click.group()
def group() -> None:
    """Prepare and inspect datasets."""


@group.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core.")
@json_option
def prepare(recipe: Path, sets: tuple[str, ...], workers: int, as_json: bool) -> None:
    """Make the dataset that RECIPE describes; what is done already is not done again."""
    from lapis.data.pipeline import prepare as prepare_data
    from lapis.home import Home
    from lapis.log import progress

    loaded = _recipe(recipe, sets)
    with progress("data") as report:
        dataset = prepare_data(
            loaded.sources, loaded.tokenizer, Home.default(), workers=workers, progress=report
        )
    if as_json:
        print_json(_facts(dataset))
        return
    _print_report(dataset)
    documents = dataset.manifest["documents"]
    say(f"\n{dataset.tokens:,} training tokens in {documents:,} documents, digest {dataset.digest[:16]}")
    say(f"The dataset lies in {dataset.folder}")


@group.command()
@click.argument("dataset", type=click.Path(path_type=Path), metavar="DATASET|RECIPE")
@click.option("--documents", type=click.IntRange(min=0), default=3, help="How many documents to show.")
@json_option
def inspect(dataset: Path, documents: int, as_json: bool) -> None:
    """Show what is in a prepared dataset: steps, licences, token statistics, some documents."""
    found = _dataset(dataset)
    if as_json:
        print_json(_facts(found) | {"documents_shown": _some_documents(found, documents)})
        return
    _print_report(found)
    say("\nLicences of the training documents")
    columns = ("source", "licence", "documents", "bytes", "tokens")
    table = sorted(found.manifest["licences"], key=lambda row: -row["tokens"])
    rows = [[row[name] or "unknown" for name in columns] for row in table]
    print_table(columns, rows)
    say("\nTokens")
    rows = [[name.replace("_", " "), value] for name, value in _statistics(found).items()]
    print_table(("fact", "value"), rows)
    for shown in _some_documents(found, documents):
        licence = shown["licence"] or "licence unknown"
        say(f"\n--- {shown['source']}: {shown['path']} ({licence}, {shown['tokens']:,} tokens)")
        say(str(shown["text"]))


def _recipe(path: Path, sets: tuple[str, ...]) -> Recipe:
    from lapis import config
    from lapis.train.recipe import Recipe

    return config.load(path, Recipe, sets)


def _dataset(path: Path) -> Dataset:
    from lapis.data.pipeline import find
    from lapis.data.shards import Dataset
    from lapis.home import Home

    if path.is_dir():
        return Dataset.open(path)
    loaded = _recipe(path, ())
    return find(loaded.sources, loaded.tokenizer, Home.default())


def _facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "folder": str(dataset.folder),
        "digest": dataset.digest,
        "statistics": _statistics(dataset),
        "licences": dataset.manifest["licences"],
        "steps": [step.plain() for step in dataset.report],
    }


def _statistics(dataset: Dataset) -> dict[str, int | float]:
    facts = dataset.manifest
    held = facts["heldout"]
    return {
        "documents": facts["documents"],
        "tokens": facts["tokens"],
        "bytes": facts["bytes"],
        "bytes_per_token": round(facts["bytes"] / max(1, facts["tokens"] - facts["documents"]), 3),
        "tokens_per_document": round(facts["tokens"] / max(1, facts["documents"]), 1),
        "vocabulary": facts["tokenizer"]["vocab_size"],
        "shards": len(facts["shards"]),
        "heldout_documents": held["documents"],
        "heldout_bytes": held["bytes"],
    }


def _some_documents(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Documents spread evenly over the stream, which lies in the order of digests: a random sample."""
    starts = dataset.document_starts
    shown = []
    for n in range(min(count, len(starts))):
        entry = dataset.document_of(int(starts[n * len(starts) // count]))
        ids = dataset.read(entry.start + 1, min(entry.tokens - 1, SHOWN_CHARS)).tolist()
        shown.append({**asdict(entry), "text": dataset.tokenizer.decode(ids)[:SHOWN_CHARS]})
    return shown


def _print_report(dataset: Dataset) -> None:
    print_table(
        ("step", "documents in", "documents out", "MB in", "MB out", "seconds", "why dropped", "notes"),
        [_row(step) for step in dataset.report],
    )


def _row(step: Step) -> tuple[object, ...]:
    notes = ", ".join(f"{what} {count:,}" for what, count in step.notes.items())
    sizes = (step.bytes_in / 1e6, step.bytes_out / 1e6, round(step.seconds, 2))
    return (step.step, step.documents_in, step.documents_out, *sizes, step.top_reasons(), notes)
