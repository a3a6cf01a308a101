"""What a run's steps have read: the tokens of a step, and from which step on its checkpoints contain a document.

Exact, because the order of the data is a function that can be asked both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapis.checkpoint.folder import listing
from lapis.data.loader import TokenLoader
from lapis.data.remove import Found, Removal, search
from lapis.data.shards import Dataset
from lapis.data.streams import Piece
from lapis.errors import InputError, IntegrityError
from lapis.home import Home
from lapis.train.pretrain import token_loader
from lapis.train.run import Run
from lapis.train.segments import recipe_of, segments_of_run


@dataclass(frozen=True)
class Use:
    """A run on data that has some of the documents in question."""

    run: str
    dataset: str
    documents: int  # of them in its training text; 0 if that is not known
    first_step: int | None  # from 0 on, the first that reads one of them; None if none ever does
    done: int  # steps done
    checkpoints: tuple[int, ...]  # those that have read some, by their steps
    unknown: str = ""  # why nothing can be said, if nothing can


def pieces_of_step(run: Run, dataset: Dataset, step: int) -> list[Piece]:
    """The tokens of the dataset that a step (from 0 on) reads, on all its ranks. Raises InputError for one not done."""
    done = steps_done(run)
    if not 0 <= step < done:
        raise InputError(
            f"The run {run.id} has done {done:,} steps; {step:,} is none of them.",
            hint="Steps count from 0: the event `step` of number n tells of step n - 1.",
        )
    loader = _loader(run, dataset)
    samples = loader.samples_at(step * loader.batch, loader.batch)
    return [piece for sample in samples for piece in loader.pieces(sample)]


def steps_done(run: Run) -> int:
    """How many steps a run has done, as its events and its checkpoints tell."""
    steps = run.steps()
    checkpoints = listing(run.checkpoints)[0]
    return max(steps[-1]["step"] if steps else 0, checkpoints[-1].step if checkpoints else 0)


def uses(home: Home, removals: Sequence[Removal]) -> list[Use]:
    """The runs of a home whose training text has documents that removals cover, and which checkpoints read some."""
    opened: dict[Path, tuple[Dataset, Found]] = {}
    result = []
    for run in Run.list(home):
        started = [event for event in run.events.read("start") if "dataset" in event]
        if not started:
            continue  # fine-tuned on examples, or never started
        folder = Path(started[-1]["dataset"])
        try:
            if folder not in opened:
                dataset = Dataset.open(folder)
                opened[folder] = dataset, search(dataset, removals)
        except (InputError, IntegrityError) as error:
            result.append(Use(run.id, str(folder), 0, None, steps_done(run), (), error.message))
            continue
        dataset, found = opened[folder]
        if found.documents:
            result.append(_use(run, dataset, found))
    return result


def _use(run: Run, dataset: Dataset, found: Found) -> Use:
    pieces: dict[str, list[Piece]] = {}
    for entry in found.documents:
        pieces.setdefault(entry.source, []).append(Piece(entry.start, entry.tokens))
    loader = _loader(run, dataset)
    place = loader.first_use(pieces)
    first = None if place is None else place // loader.batch
    kept = [checkpoint.step for checkpoint in listing(run.checkpoints)[0]]
    read = tuple(step for step in kept if first is not None and step > first)
    return Use(run.id, str(dataset.folder), len(found.documents), first, steps_done(run), read)


def _loader(run: Run, dataset: Dataset) -> TokenLoader:
    return token_loader(recipe_of(run).train, dataset, segments_of_run(run))
