"""`lapis config`: every setting of a recipe, with type, default and one sentence."""

from __future__ import annotations

from dataclasses import asdict

import click

from lapis.cli.output import json_option, print_json, print_table, say


@click.command()
@click.argument("recipe", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=c", help="Override one setting of RECIPE; repeatable."
)
@json_option
def command(recipe: str | None, sets: tuple[str, ...], as_json: bool) -> None:
    """Print every setting of a recipe; with RECIPE, print that recipe resolved, and its digest."""
    from pathlib import Path

    from lapis import config
    from lapis.train.recipe import Recipe

    if sets and not recipe:
        raise click.UsageError("--set is for a RECIPE: name one.")
    if recipe:
        resolved = config.load(Path(recipe), Recipe, sets)
        if as_json:
            print_json({"digest": resolved.digest(), "recipe": resolved.model_dump(mode="json")})
        else:
            say(f"# digest {resolved.digest()}\n{config.to_toml(resolved)}")
        return
    fields = list(config.fields(Recipe))
    if as_json:
        print_json([asdict(field) for field in fields])
        return
    print_table(
        ["key", "type", "default", "what it is"], [(f.key, f.type, f.default, f.text) for f in fields]
    )
