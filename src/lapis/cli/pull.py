"""`lapis pull`: fetch a model and keep it under a name."""

from __future__ import annotations

import click

from lapis.cli.output import json_option, print_json, say


@click.command()
@click.argument("reference")
@click.option(
    "--name", help="Keep it under this name; by default the last part of the reference, lower case."
)
@json_option
def command(reference: str, name: str | None, as_json: bool) -> None:
    """Fetch a model: a known name, FILE.gguf, a Hugging Face FOLDER, or hf:owner/name[@revision].

    It is converted once into safetensors, with its source, licence and digests. `lapis models pull` is the same.
    """
    from lapis.cli.models import facts
    from lapis.home import Home
    from lapis.log import progress
    from lapis.model.pull import name_of, pull
    from lapis.model.store import ModelStore

    home = Home.default()
    known = {model.name for model in ModelStore(home).list()}
    with progress("pull") as report:
        model = pull(reference, home, name or name_of(reference), report)
    if as_json:
        print_json({**facts(model), "new": model.name not in known})
        return
    if model.name in known:
        say(f"{model.name} is there already: {model.folder}")
        say(f"From {model.source.reference}. To fetch it anew: lapis models remove {model.name}")
        return
    say(
        f"{model.name}: {model.parameters:,} parameters, {model.bytes / 1e6:.0f} MB, licence {model.licence}."
    )
    say(f"From {model.source.reference}; digest {model.digest[:16]}; in {model.folder}.")
    say(f"Next: lapis chat {model.name}")
