"""`lapis train RECIPE`: prepare the data if needed, then train; run again to go on where it stopped."""

from __future__ import annotations

from pathlib import Path

import click

from lapis.cli.output import json_option, print_json, say


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting; repeatable.")
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="Processes for the data; 0 is one per core."
)
@click.option("--ranks", type=click.IntRange(min=1), help="Train by so many processes, under a supervisor.")
@click.option(
    "--spares",
    type=click.IntRange(min=0),
    default=0,
    help="Devices beyond --ranks, to replace one that is lost.",
)
@json_option
def command(
    recipe: Path, sets: tuple[str, ...], workers: int, ranks: int | None, spares: int, as_json: bool
) -> None:
    """Train a model by RECIPE. A run that was stopped or killed goes on from its last checkpoint."""
    from dataclasses import asdict

    from lapis import config
    from lapis.data.pipeline import prepare
    from lapis.home import Home
    from lapis.log import progress
    from lapis.train.pretrain import Pretraining
    from lapis.train.rank import program
    from lapis.train.recipe import Recipe
    from lapis.train.start import with_own_tokenizer
    from lapis.train.supervisor import train_ranks
    from lapis.train.trainer import find_or_create, train

    home = Home.default()
    resolved = with_own_tokenizer(config.load(recipe, Recipe, sets), home)
    with progress("data") as report:
        dataset = prepare(resolved.data, resolved.tokenizer, home, workers=workers, progress=report)
    objective = Pretraining(resolved.train, dataset)
    run = find_or_create(home, resolved, config.to_toml(resolved), objective)
    if not as_json:
        say(f"{run.id}: training on {dataset.tokens:,} tokens")
    if ranks is None:
        with progress("train") as report:
            train(resolved, objective, run, report)
    else:
        train_ranks(run, program(home, run, objective), ranks, spares, resolved.supervisor)
    summary = run.summary()
    if as_json:
        print_json(asdict(summary))
        return
    say(f"{run.id}: step {summary.step:,}, loss {summary.loss:.4f}, {summary.seconds:,.0f} s of training")
    say(
        f"Next: lapis evaluate {run.id}   lapis runs plot {run.id}   lapis release create NAME --run {run.id}"
    )
