"""A run's weights as a model folder: what releases, evaluation and other programs load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.checkpoint.sharded import Checkpoint, latest, load
from lapis.data.shards import Dataset
from lapis.errors import ConflictError
from lapis.home import Home
from lapis.model.config import ModelConfig
from lapis.model.manifest import Source
from lapis.model.weights import write_model
from lapis.train.run import Run


@dataclass(frozen=True)
class Exported:
    """A model folder (temporary), the run's evaluation if there is one, and where the weights come from."""

    folder: Path
    report: dict[str, Any] | None
    lineage: dict[str, Any]


@contextmanager
def exported_run(home: Home, run_id: str, *, average: bool = False) -> Iterator[Exported]:
    """Export the run's last good checkpoint to a temporary model folder, in the type that it was trained in.

    `average` takes the average of the weights, which the run's evaluation did not measure. Raises NotFoundError,
    and ConflictError for a run without a checkpoint or without an average.
    """
    run = Run.find(home, run_id)
    checkpoint = last_checkpoint(run)
    loaded = load(checkpoint)
    if average and "ema" not in loaded.groups:
        raise ConflictError(f"The run {run.id} keeps no average of its weights.", hint="Set train.ema.")
    state = loaded.groups["ema" if average else "model"]
    dataset = Dataset.open(dataset_folder(run))
    lineage = {
        "run": run.id,
        "checkpoint": checkpoint.digest,
        "step": loaded.state["step"],
        "average": average,
        "dataset": dataset.digest,
        "tokenizer": dataset.tokenizer.digest,
        "licences": dataset.manifest["licences"],
    }
    with tempfile.TemporaryDirectory(prefix="lapis-export-") as temporary:
        folder = Path(temporary) / "model"
        write_model(
            folder,
            ModelConfig(**loaded.state["model"]),
            state,
            dataset.tokenizer,
            source=Source(kind="run", reference=run.id, licence=_licence(lineage["licences"])),
            chat_template=None,
            add_bos=True,
            dtype=loaded.groups["model"]["embed"].dtype,
        )
        yield Exported(folder, None if average else run.evaluation(), lineage)


def last_checkpoint(run: Run) -> Checkpoint:
    """The last good checkpoint of a run. Raises ConflictError if there is none."""
    checkpoint = latest(run.checkpoints)
    if checkpoint is None:
        raise ConflictError(
            f"The run {run.id} has no checkpoint yet.", hint="`lapis train RECIPE.toml` goes on with it."
        )
    return checkpoint


def dataset_folder(run: Run) -> Path:
    """Where the dataset lies that a run was trained on. Raises ConflictError for a run that never started."""
    started = run.events.read("start")
    if not started:
        raise ConflictError(f"The run {run.id} has not started.", hint="`lapis train RECIPE.toml` starts it.")
    return Path(started[-1]["dataset"])


def _licence(table: Sequence[Mapping[str, Any]]) -> str:
    """The weights' licence in words: one for all of the texts, or that they are mixed (the lineage counts them)."""
    names = {str(row["licence"]) for row in table if row["licence"]}
    stated = all(row["licence"] for row in table)
    if len(names) == 1 and stated:
        return names.pop()
    return "mixed: see the licences of the training texts" if names else "unknown"
