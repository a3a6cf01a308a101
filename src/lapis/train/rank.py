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
from lapis.train.recipe import Recipe
from lapis.train.run import RECIPE, Run
from lapis.train.trainer import train


def program(home: Home, run: Run, objective: Objective, mesh: str = "") -> Program:
    """The program of a run's ranks on a mesh, which may be another one than when the run began."""
    return Program(__name__, (str(home.root), run.id, str(objective.facts().get("dataset", "")), mesh))


def main(arguments: Sequence[str]) -> None:
    """Train: `arguments` are the home, the run's id, the dataset's folder (none: on examples), and the mesh."""
    root, run_id, dataset, mesh = arguments
    home = Home(Path(root))
    run = Run.open(home, run_id)
    with progress("train") as report:
        recipe = config.load(run.folder / RECIPE, Recipe, (f"train.mesh={mesh}",))
        objective: Objective = (
            Pretraining(recipe.train, Dataset.open(Path(dataset)), recipe.mixture)
            if dataset
            else fine_tuning(recipe, home)
        )
        train(recipe, objective, run, report)
