"""A run's weights measured on held-out text: those of its last good checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lapis import config
from lapis.checkpoint.sharded import load
from lapis.data.shards import Dataset
from lapis.errors import ConflictError
from lapis.evaluate.evaluation import evaluate
from lapis.evaluate.report import EvalReport
from lapis.log import Progress, silent
from lapis.model.families import build
from lapis.train.export import best_checkpoint, dataset_folder, last_checkpoint, trained_weights
from lapis.train.pretrain import trained_tokens
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.segments import segments_of_run


class Ground(NamedTuple):
    """What a model is measured on: a dataset's held-out text, and the tokens that the 5-gram counts."""

    dataset: Dataset
    counted: NDArray[np.integer]


def ground_of_run(run: Run, steps: int) -> Ground:
    """A run's own dataset, and the tokens that its first `steps` steps saw. Raises ConflictError for no step."""
    if steps < 1:
        raise ConflictError(f"The run {run.id} has not done a step yet.", hint="`lapis train RECIPE.toml`")
    dataset = Dataset.open(dataset_folder(run))
    section = config.load(run.folder / "recipe.toml", Recipe).train
    return Ground(dataset, trained_tokens(section, dataset, steps, segments_of_run(run)))


def measure_run(
    run: Run, ground: Ground | None = None, progress: Progress = silent, *, best: bool = False
) -> EvalReport:
    """Measure a run's last good checkpoint, or its best, on its own dataset unless `ground` names another.

    Raises ConflictError for a run without a checkpoint.
    """
    checkpoint = best_checkpoint(run) if best else last_checkpoint(run)
    loaded = load(checkpoint)
    weights = trained_weights(run, loaded)
    model = build(weights.config, dtype=weights.state["embed"].dtype)
    model.load_state_dict(weights.state)
    model.ops.weights_changed()
    own = ground_of_run(run, checkpoint.step) if ground is None else ground
    tokenizer = Dataset.open(dataset_folder(run)).tokenizer
    report = evaluate(model, own.dataset, train_tokens=own.counted, tokenizer=tokenizer, progress=progress)
    return replace(report, subject=f"{run.id} at step {checkpoint.step}", weights=checkpoint.digest)
