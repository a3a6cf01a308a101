"""What every rank of `lapis train --ranks` runs: the training of one run, in the place the environment names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lapis import config
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.log import progress
from lapis.train.base import fine_tuning
from lapis.train.launch import Program
from lapis.train.objective import Objective
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe, TrainSection
from lapis.train.run import RECIPE, Run
from lapis.train.trainer import train


def program(home: Home, run: Run, objective: Objective, section: TrainSection) -> Program:
    """The program of a run's ranks; mesh, pipeline and samples may be others than when the run began."""
    samples = config.toml_value(section.samples.model_dump(mode="json"))
    sets = (
        f"train.mesh={section.mesh}",
        f"train.pipeline={section.pipeline}",
        f"train.samples={samples}",
    )
    return Program(__name__, (str(home.root), run.id, str(objective.facts().get("dataset", "")), *sets))


def main(arguments: Sequence[str]) -> None:
    """Train: `arguments` are the home, the run's id, the dataset's folder (none: on examples), and settings."""
    root, run_id, dataset, *sets = arguments
    home = Home(Path(root))
    run = Run.open(home, run_id)
    with progress("train") as report:
        recipe = config.load(run.folder / RECIPE, Recipe, sets)
        objective: Objective = (
            Pretraining(recipe.train, Dataset.open(Path(dataset)), recipe.mixture)
            if dataset
            else fine_tuning(recipe, home)
        )
        train(recipe, objective, run, report)
