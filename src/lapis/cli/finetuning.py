"""`lapis finetuning`: the two steps of a fine-tuning job, as the server's queue starts them. Not for people."""

from __future__ import annotations

import click


@click.group()
def group() -> None:
    """Work on a fine-tuning job that was created through the API; the server's queue starts this."""


@group.command()
@click.argument("job")
def check(job: str) -> None:
    """Read the files of JOB, and queue its training."""
    from lapis.finetuning import check
    from lapis.home import Home

    check(Home.default(), job)


@group.command()
@click.argument("job")
def train(job: str) -> None:
    """Train JOB, or go on with it, and register its model."""
    from lapis.finetuning import train
    from lapis.home import Home

    train(Home.default(), job)
