"""`lapis data`: prepare and inspect datasets."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from lapis.cli.data_classifier import classifier
from lapis.cli.output import json_option, print_json, print_table, say
from lapis.cli.trace import remove, trace

if TYPE_CHECKING:
    from lapis.data.report import Step
    from lapis.data.shards import Dataset
    from lapis.train.recipe import Recipe

SHOWN_CHARS = 300


@click.group()
def group() -> None:
    """Prepare and inspect datasets, trace their tokens, remove documents."""


group.add_command(trace)
group.add_command(remove)


group.add_command(classifier)


@group.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core.")
@click.option(
    "--on",
    type=click.Choice(["processes", "ray"]),
    default="processes",
    help="Where: processes of this machine, or all cores of the Ray cluster at RAY_ADDRESS.",
)
@json_option
def prepare(
    recipe: Path, sets: tuple[str, ...], workers: int, on: Literal["processes", "ray"], as_json: bool
) -> None:
    """Make the dataset that RECIPE describes; what is done already is not done again."""
    from lapis.data.workers import warm_up

    if workers and on == "ray":
        raise click.UsageError("--on ray uses all cores of the cluster: leave --workers out.")
    if on == "processes":
        warm_up(workers)  # before this process loads the same
    from lapis.data.pipeline import prepare as prepare_data
    from lapis.home import Home
    from lapis.log import progress

    loaded = _recipe(recipe, sets)
    with progress("data") as report:
        dataset = prepare_data(
            loaded.sources, loaded.tokenizer, Home.default(), workers=workers, on=on, progress=report
        )
    if as_json:
        print_json(_facts(dataset))
        return
    _print_report(dataset)
    documents = dataset.manifest["documents"]
    say(f"\n{dataset.tokens:,} training tokens in {documents:,} documents, digest {dataset.digest[:16]}")
    say(f"What was kept and dropped, to look at: {dataset.folder / 'report.html'}")
    say(f"The dataset lies in {dataset.folder}")


@group.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes; 0 is one per core.")
@json_option
def preview(recipe: Path, sets: tuple[str, ...], workers: int, as_json: bool) -> None:
    """Measure 1 % of RECIPE's input and predict what the full run keeps, takes and writes."""
    from lapis.data.preview import preview as preview_data
    from lapis.home import Home
    from lapis.log import progress

    loaded = _recipe(recipe, sets)
    with progress("preview") as report:
        found = preview_data(
            loaded.sources, loaded.tokenizer, Home.default(), workers=workers, progress=report
        )
    if as_json:
        totals = {"total_seconds": found.total_seconds, "total_disk": found.total_disk}
        print_json({**asdict(found), **totals})
        return
    say(f"measured {found.sample_documents:,} documents, {found.sample_bytes / 1e6:,.1f} MB of text")
    facts = [
        ("documents read", f"{found.documents:,}"),
        ("text read", f"{found.bytes / 1e6:,.1f} MB"),
        ("documents kept", f"{found.kept_documents:,}"),
        ("text kept", f"{found.kept_bytes / 1e6:,.1f} MB"),
        ("duplicates among what rules keep", f"{found.duplicates:.1%}"),
        ("training tokens", f"{found.tokens:,}"),
        (f"time with {found.workers} workers", f"{found.total_seconds:,.0f} s"),
        ("disk", f"{found.total_disk / 1e6:,.0f} MB"),
    ]
    print_table(("predicted for the full run", ""), facts)
    say()
    print_table(("step", "seconds"), [(step, round(spent, 1)) for step, spent in found.seconds.items()])
    say()
    print_table(("stage", "MB"), [(stage, size / 1e6) for stage, size in found.disk.items()])


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
    columns = ("source", "licence", "family", "documents", "bytes", "tokens")
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
    if (found.folder / "report.html").exists():
        say(f"\nSamples kept and dropped, duplicates, lengths: {found.folder / 'report.html'}")


@group.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=c", help="Show another threshold beside; repeatable."
)
@json_option
def rules(recipe: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Show what each rule of RECIPE costs, from what is known about its documents: nothing is computed again.

    FIRST counts documents that no rule before it drops, ALONE all that it would drop by itself. With --set the
    recipe's own thresholds stand beside the changed ones.
    """
    from lapis.data.costs import BYTES_PER_TOKEN, bytes_per_token, reason_costs
    from lapis.data.sources import list_inputs
    from lapis.home import Home

    loaded, home = _recipe(recipe, ()), Home.default()
    listing = list_inputs(loaded.sources)
    known = bytes_per_token(loaded.sources, loaded.tokenizer, listing, home)
    ratio = known or BYTES_PER_TOKEN
    found = {"present": reason_costs(loaded.sources, loaded.tokenizer, listing, home).plain(ratio)}
    if sets:
        changed = _recipe(recipe, sets)
        listing = list_inputs(changed.sources)
        found["changed"] = reason_costs(changed.sources, changed.tokenizer, listing, home).plain(ratio)
    if as_json:
        print_json({"bytes_per_token": ratio, "measured": known is not None, **found})
        return
    _print_costs(**found)
    source = "as in the prepared dataset" if known else "assumed: the recipe has no dataset yet"
    say(f"\nTokens are estimated at {ratio:.2f} bytes each ({source}).")


def _print_costs(present: dict[str, Any], changed: dict[str, Any] | None = None) -> None:
    """One row a reason; with changed thresholds, what it costs then and how many tokens more."""
    columns = ["step", "reason", "documents", "MB", "tokens", "alone documents", "alone MB", "alone tokens"]
    shown = [_cost_row(row) for row in present["reasons"]]
    kept = [_kept_row(present)]
    if changed is not None:
        columns += ["changed documents", "changed MB", "changed tokens", "tokens more"]
        after = {(row["step"], row["reason"]): row for row in changed["reasons"]}
        before = {(row["step"], row["reason"]): row for row in present["reasons"]}
        none = {"documents": 0, "bytes": 0, "tokens": 0}
        shown = []
        for key in dict.fromkeys([*before, *after]):
            old, new = before.get(key, none), after.get(key, none)
            shown.append([*_cost_row({"step": key[0], "reason": key[1], **old}), *_changed(old, new)])
        kept[0] += _changed(present["kept"], changed["kept"])
    print_table(columns, [*(row for row in shown if any(row[2:])), *kept])


def _cost_row(row: dict[str, Any]) -> list[object]:
    alone = row.get("alone_bytes")
    return [
        *(row["step"], row["reason"], row["documents"], row["bytes"] / 1e6, row["tokens"]),
        *(row.get("alone_documents"), None if alone is None else alone / 1e6, row.get("alone_tokens")),
    ]


def _kept_row(costs: dict[str, Any]) -> list[object]:
    kept = costs["kept"]
    return ["trained on", "", kept["documents"], kept["bytes"] / 1e6, kept["tokens"], None, None, None]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[object]:
    return [new["documents"], new["bytes"] / 1e6, new["tokens"], new["tokens"] - old["tokens"]]


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
    return find(loaded.sources, loaded.tokenizer, Home.default(), str(path))


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
    sizes = (step.bytes_in / 1e6 or None, step.bytes_out / 1e6, round(step.seconds, 2))
    return (step.step, step.documents_in, step.documents_out, *sizes, step.top_reasons(), notes)
