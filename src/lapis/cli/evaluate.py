"""`lapis evaluate`: bits per byte of a run, a release or a model on held-out text, beside yardsticks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lapis.cli.output import json_option, print_json, print_table, say

if TYPE_CHECKING:
    from lapis.evaluate.report import EvalReport
    from lapis.home import Home
    from lapis.log import Progress
    from lapis.release.registry import Registry
    from lapis.release.release import Release
    from lapis.train.measure import Ground
    from lapis.train.run import Run

YARDSTICK_TOKENS = 3_000_000  # what the 5-gram counts where it is not known what the model was trained on


@click.command()
@click.argument("subject", metavar="RUN|MODEL")
@click.option(
    "--data", metavar="DATASET", help="A dataset's folder, or its name below the home's data folder."
)
@click.option(
    "--best", is_flag=True, help="Of a run: its checkpoint of the lowest held-out loss, not the last."
)
@json_option
def command(subject: str, data: str | None, best: bool, as_json: bool) -> None:
    """Measure a run or a model on held-out text in bits per byte, beside yardsticks.

    A RUN (an id, the beginning of one, or `last`) is measured on the held-out documents of its own dataset,
    a release on those of its run; the result is kept with it. Any other MODEL, name or folder, needs --data.
    """
    from lapis.home import Home
    from lapis.log import progress
    from lapis.train.measure import measure_run

    home = Home.default()
    run, release, folder = _find(home, subject)
    if best and run is None:
        raise click.UsageError("--best is for runs: name one.")
    with progress("evaluate") as shown:
        if run is not None:
            ground = None if data is None else _ground_named(home, data)
            report = measure_run(run, ground, shown, best=best)
        else:
            report = _measure_folder(home, subject, folder, release, data, shown)
    kept = _keep(home, run, release, data, report)
    if as_json:
        print_json(report.to_dict())
    else:
        _say_report(report, kept)


def _find(home: Home, subject: str) -> tuple[Run | None, Release | None, Path]:
    """What is meant: a run by its whole id or `last`, a model by its name, a run by the beginning of its id.

    Raises NotFoundError, InputError for a beginning that fits several runs.
    """
    from lapis.errors import NotFoundError
    from lapis.model.store import ModelStore
    from lapis.train.run import Run

    runs = [run for run in Run.list(home) if subject in ("last", run.id)]
    if runs:
        return runs[-1], None, runs[-1].folder
    if "/" in subject or Path(subject).is_dir():
        return None, None, Path(subject)
    releases = [item for item in _registry(home).list() if subject in (item.name, item.id)]
    if releases:
        return None, releases[-1], releases[-1].folder
    models = [model for model in ModelStore(home).list() if model.name == subject]
    if models:
        return None, None, models[0].folder
    try:
        run = Run.find(home, subject)
    except NotFoundError as error:
        hint = "`lapis runs list` shows the runs, `lapis models list` the models."
        raise NotFoundError(f"There is no run and no model {subject!r}.", hint=hint) from error
    return run, None, run.folder


def _measure_folder(
    home: Home, subject: str, folder: Path, release: Release | None, data: str | None, progress: Progress
) -> EvalReport:
    from lapis.errors import InputError
    from lapis.evaluate.evaluation import evaluate
    from lapis.model.weights import read_model
    from lapis.train.measure import ground_of_run
    from lapis.train.run import Run

    if data is not None:
        ground = _ground_named(home, data)
    elif release is not None and release.run_id is not None:
        run = Run.find(home, release.run_id)
        ground = ground_of_run(run, run.summary().step or 0)
    else:
        raise InputError(
            f"{subject} is not a run: on which dataset is it to be measured?",
            hint=f"`lapis data prepare RECIPE.toml` makes one; then: lapis evaluate {subject} --data DATASET",
        )
    loaded = read_model(folder, progress=progress)
    report = evaluate(
        loaded.model,
        ground.dataset,
        train_tokens=ground.counted,
        tokenizer=loaded.tokenizer,
        progress=progress,
    )
    name = release.id if release is not None else subject
    return replace(report, subject=name, weights=loaded.manifest.digest)


def _ground_named(home: Home, data: str) -> Ground:
    """A dataset by its folder or name. What a model was trained on is not known: the 5-gram gets its share."""
    from lapis.data.shards import Dataset
    from lapis.train.measure import Ground

    path = Path(data).expanduser()
    dataset = Dataset.open(path if path.is_dir() else home.data / data)
    return Ground(dataset, dataset.read(0, min(dataset.tokens, YARDSTICK_TOKENS)))


def _keep(home: Home, run: Run | None, release: Release | None, data: str | None, report: EvalReport) -> str:
    """Keep a result with what it was measured on; says where and what to do next."""
    from lapis.audit import os_user

    if run is not None and data is None:
        run.write_evaluation(report.to_dict())
        return f"Kept in {run.folder / 'eval.json'}. Next: lapis release create NAME --run {run.id}"
    if release is not None and release.state == "draft":
        _registry(home).record_evaluation(release.id, report.to_dict(), os_user())
        return f"Kept with {release.id}. Next: lapis release approve {release.id}"
    return ""


def _registry(home: Home) -> Registry:
    from lapis.db import open_database
    from lapis.release.registry import Registry

    return Registry(home, open_database(home.database_url))


def _say_report(report: EvalReport, kept: str) -> None:
    from lapis.evaluate.report import COLUMNS, rows, summary

    shape = f"{report.parameters:,} parameters, context {report.context:,}, kernels {report.kernels}"
    say(f"{report.subject}: {shape}")
    say()
    print_table(COLUMNS, rows(report))
    say()
    say(summary(report))
    if report.empty_documents:
        say(f"{report.empty_documents:,} held-out documents had no text and were left out.")
    if kept:
        say(kept)
