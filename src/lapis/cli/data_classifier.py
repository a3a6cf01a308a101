"""`lapis data classifier`: a quality score learned from examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lapis.cli.output import json_option, print_json, say

if TYPE_CHECKING:
    from lapis.data.words import Words

CHUNK = 40  # documents split into words at once


@click.group(name="classifier")
def classifier() -> None:
    """Learn to score documents from good and bad examples."""


@classifier.command()
@click.option("--good", multiple=True, required=True, type=click.Path(path_type=Path), help="Repeatable.")
@click.option("--bad", multiple=True, required=True, type=click.Path(path_type=Path), help="Repeatable.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the model goes.")
@click.option("--seed", type=int, default=0, help="The order in which examples are learned from.")
@json_option
def train(good: tuple[Path, ...], bad: tuple[Path, ...], out: Path, seed: int, as_json: bool) -> None:
    """Learn from files or folders of GOOD and BAD texts; a tenth is held out and measured on."""
    from lapis.data.score import train as learn

    found = learn(_words(good), _words(bad), seed=seed)
    found.classifier.save(out)
    if as_json:
        facts = ("trained", "heldout", "auc", "accuracy")
        print_json({"model": str(out)} | {name: getattr(found, name) for name in facts})
        return
    say(
        f"Learned from {found.trained:,} texts. Of {found.heldout:,} held-out ones {found.accuracy:.1%} are told right;"
    )
    say(f"a good one scores above a bad one with a chance of {found.auc:.4f} (area under the curve).")
    say(f'In a recipe: [data.score] model = "{out}", and min_score or keep.')


def _words(paths: tuple[Path, ...]) -> list[Words]:
    """The words of all documents of some files and folders, a few documents at a time."""
    from lapis.data.document import Document
    from lapis.data.readers import plan_parts, read_part
    from lapis.data.recipe import DataConfig, SourceConfig
    from lapis.data.repair import repair
    from lapis.data.sources import list_inputs
    from lapis.data.words import split_words

    config = DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in paths))
    parts = plan_parts(list_inputs(config).inputs)
    found = (one for part in parts for one in read_part(part, config.document_chars))
    texts = [repair(one.text) for one in found if isinstance(one, Document)]
    return [split_words(texts[n : n + CHUNK]) for n in range(0, len(texts), CHUNK)]
