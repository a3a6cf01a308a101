"""`lapis data trace` and `lapis data remove`: from tokens to documents, and documents out of the data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.data.remove import Found, Removal
    from lapis.data.shards import Dataset
    from lapis.train.uses import Use

SHOWN = 20  # documents of a trace; --json has all


@click.command()
@click.argument("target", metavar="DATASET|RECIPE|RUN")
@click.argument("tokens", required=False, metavar="[FROM:TO]")
@click.option("--step", type=click.IntRange(min=0), help="All that this step of a RUN read; the first is 0.")
@json_option
def trace(target: str, tokens: str | None, step: int | None, as_json: bool) -> None:
    """Name the documents that tokens of the training stream, or of a run's step, come from."""
    from lapis.data.trace import licence_table, parse_range
    from lapis.data.trace import trace as traced_documents
    from lapis.errors import InputError
    from lapis.home import Home
    from lapis.train.run import Run
    from lapis.train.uses import pieces_of_step

    if (tokens is None) == (step is None):
        raise InputError(
            "Give a range of tokens or a step, and one of them.",
            hint="lapis data trace DATASET 1000:2000   lapis data trace RUN --step 120",
        )
    dataset = _dataset(target)
    if step is not None:
        pieces = pieces_of_step(Run.find(Home.default(), target), dataset, step)
    else:
        pieces = [parse_range(tokens or "")]
    found = traced_documents(dataset, pieces)
    table = licence_table(found)
    if as_json:
        documents = [
            {**asdict(one.document), "tokens": one.tokens, "of": one.document.tokens} for one in found
        ]
        total = sum(piece.tokens for piece in pieces)
        facts = {"dataset": str(dataset.folder), "digest": dataset.digest, "step": step, "tokens": total}
        print_json({**facts, "documents": documents, "licences": [row._asdict() for row in table]})
        return
    rows = [
        (
            one.document.source,
            one.document.path,
            one.document.licence or "unknown",
            one.tokens,
            one.document.id,
        )
        for one in sorted(found, key=lambda one: -one.tokens)[:SHOWN]
    ]
    print_table(("source", "path", "licence", "tokens", "document"), rows)
    if len(found) > SHOWN:
        say(f"… and {len(found) - SHOWN:,} more; --json shows all.")
    say()
    print_table(
        ("source", "licence", "documents", "tokens"),
        [(row.source, row.licence or "unknown", row.documents, row.tokens) for row in table],
    )


@click.command()
@click.argument("target", metavar="DATASET|RECIPE|RUN")
@click.option("--source", help="All documents of this source.")
@click.option(
    "--document", "documents", multiple=True, metavar="ID", help="This text, wherever it is; repeatable."
)
@click.option("--licence", help="All documents of this licence; with the others: only those of them.")
@click.option("--dry-run", is_flag=True, help="Say what it would do, and which checkpoints are concerned.")
@json_option
def remove(
    target: str,
    source: str | None,
    documents: tuple[str, ...],
    licence: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Leave documents out: new shards without them, of this and of every later dataset of this home.

    Says which shards and which checkpoints of runs have them. The old dataset stays until you remove it.
    """
    from lapis.data.remove import Removal, RemovalList, search
    from lapis.errors import InputError, NotFoundError
    from lapis.home import Home
    from lapis.train.uses import uses

    if source is None and not documents and licence is None:
        raise InputError("Nothing is named to remove.", hint="Give --source, --document or --licence.")
    home, dataset = Home.default(), _dataset(target)
    removals = [Removal(source, document, licence) for document in documents or (None,)]
    found = search(dataset, removals)
    for removal in removals:
        if not _covers(found, removal):
            raise NotFoundError(
                f"No document of {dataset.folder} is {_named(removal)}.",
                hint=f"`lapis data inspect {dataset.folder}` shows sources and licences, `lapis data trace` ids.",
            )
    used = uses(home, removals)
    new = None
    if not dry_run:
        known = RemovalList(home.data)
        known.add(removals)
        new = known.apply(dataset)
    if as_json:
        print_json(_facts(dataset, found, used, new))
        return
    _say(dataset, found, used, new)


def _covers(found: Found, removal: Removal) -> bool:
    """Whether anything that was found is covered by one of the removals."""
    return any(map(removal.covers, found.documents)) or any(map(removal.covers, found.heldout))


def _dataset(target: str) -> Dataset:
    """The dataset of a folder, of a recipe, or of a run."""
    from lapis import config
    from lapis.data.pipeline import find
    from lapis.data.shards import Dataset
    from lapis.home import Home
    from lapis.train.export import dataset_folder
    from lapis.train.recipe import Recipe
    from lapis.train.run import Run

    path = Path(target)
    if path.is_dir():
        return Dataset.open(path)
    if path.is_file():
        recipe = config.load(path, Recipe)
        return find(recipe.sources, recipe.tokenizer, Home.default(), target)
    return Dataset.open(dataset_folder(Run.find(Home.default(), target)))


def _named(removal: Removal) -> str:
    named = {"the text": removal.document, "of the source": removal.source, "of the licence": removal.licence}
    return " and ".join(f"{what} {value}" for what, value in named.items() if value is not None)


def _facts(dataset: Dataset, found: Found, used: list[Use], new: Dataset | None) -> dict[str, Any]:
    return {
        "dataset": str(dataset.folder),
        "documents": len(found.documents),
        "tokens": sum(entry.tokens for entry in found.documents),
        "heldout_documents": len(found.heldout),
        "shards": {name: len(entries) for name, entries in found.shards.items()},
        "runs": [asdict(use) for use in used],
        "new": None
        if new is None
        else {"folder": str(new.folder), "digest": new.digest, "tokens": new.tokens},
    }


def _say(dataset: Dataset, found: Found, used: list[Use], new: Dataset | None) -> None:
    tokens = sum(entry.tokens for entry in found.documents)
    say(
        f"{len(found.documents):,} training documents with {tokens:,} tokens and {len(found.heldout):,} held-out ones "
        f"are concerned, in {len(found.shards)} of {len(dataset.manifest['shards'])} shards: "
        f"{', '.join(found.shards) or 'none'}"
    )
    for use in used:
        if use.unknown:
            say(f"{use.run}: cannot be told. {use.unknown}")
        elif not use.checkpoints:
            when = "never" if use.first_step is None else f"at step {use.first_step:,} at the earliest"
            say(f"{use.run}: no checkpoint that there is has read them ({when})")
        else:
            steps = ", ".join(f"{step:,}" for step in use.checkpoints)
            say(f"{use.run}: read first in step {use.first_step:,}; the checkpoints {steps} contain them")
    if not used:
        say("No run of this home was trained on them.")
    if new is not None:
        say(f"Without them: {new.tokens:,} training tokens, digest {new.digest[:16]}")
        say(
            f"The new dataset lies in {new.folder}; `lapis data prepare` and `lapis train` take it from now on."
        )
        say(f"The old one is still there: rm -r {dataset.folder}")
