"""`lapis quickstart`: from raw text to an answer, in one command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.home import Home


@click.command()
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A file or folder of text to train on; repeatable. By default the texts of this Python's library.",
)
@click.option("--minutes", type=float, default=3.0, show_default=True, help="Training time.")
@click.option(
    "--home", "folder", type=click.Path(path_type=Path), help="Where everything is kept (LAPIS_HOME)."
)
@click.option("--keep-serving", is_flag=True, help="Go on serving the model when all is done, until Ctrl-C.")
@json_option
def command(
    texts: tuple[Path, ...], minutes: float, folder: Path | None, keep_serving: bool, as_json: bool
) -> None:
    """Raw text to an answer: clean, tokenize, train a 14 M model, evaluate, release, serve, ask.

    Run again, it does only what is missing; killed anywhere, it goes on where it was.
    """
    from lapis.home import Home
    from lapis.quickstart import NAME, quickstart

    home = Home(folder.expanduser().absolute()) if folder else Home.default()
    facts = quickstart(home, texts, minutes, _silent if as_json else say)
    if as_json:
        print_json(facts)
    else:
        _tell(facts, home)
    if keep_serving:
        from lapis.server import serve

        serve(home, [NAME], ready=lambda server: say(f"Serving {NAME} at {server.url}, until Ctrl-C."))


def _silent(text: str) -> None:
    """Says nothing: standard output belongs to the JSON."""


def _tell(facts: dict[str, Any], home: Home) -> None:
    from lapis.evaluate.report import COLUMNS, EvalReport, rows, summary
    from lapis.home import Home

    report = EvalReport.from_dict(facts["evaluation"])
    say(f"\nPrompt  {facts['prompt']}\nAnswer  {facts['answer']}\n")
    print_table(COLUMNS, rows(report))
    say(summary(report) + "\n")
    table = [
        (
            stage["name"],
            f"{stage['seconds']:.1f} s",
            stage["came_in"],
            stage["came_out"],
            _short(stage["place"], home),
        )
        for stage in facts["stages"]
    ]
    print_table(["stage", "time", "came in", "came out", "where it lies"], table)
    lapis = "lapis" if shutil.which("lapis") else sys.argv[0]  # not on the PATH: the way it was called
    if home != Home.default():
        lapis = f"LAPIS_HOME={home.root} {lapis}"
    say(f"\nAll in {facts['seconds']:.0f} s, kept under {home.root}. To go on:")
    say(f"  {lapis} chat {facts['release']}     go on with texts in the terminal")
    say(f"  {lapis} serve {facts['release']}    answer any OpenAI client")
    say(f"  {lapis} runs show last        the training run: curve, checkpoints, evaluation")


def _short(place: str, home: Home) -> str:
    """A path below the home, without the home."""
    path = Path(place)
    return str(path.relative_to(home.root)) if path.is_relative_to(home.root) else place
