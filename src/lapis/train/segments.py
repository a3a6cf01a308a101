"""The segments of a run's mixture: what it began with, and each change, which is an event of its own.

A run's order is a function of its dataset, its recipe and these; a change leaves what came before its step as it was.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lapis import config
from lapis.checkpoint.folder import newest
from lapis.data.mixture import MixedOrder, Segment, changed, describe
from lapis.data.recipe import MixtureConfig
from lapis.errors import ConflictError
from lapis.train.objective import Objective
from lapis.train.pretrain import Pretraining, planned
from lapis.train.proof import SEGMENT
from lapis.train.recipe import Recipe
from lapis.train.run import RECIPE, Run


class Share(NamedTuple):
    """What a run has seen of one source."""

    source: str
    tokens: int
    part: float  # of all that it saw of the mixture
    epochs: float


def recipe_of(run: Run) -> Recipe:
    """The recipe that a run was begun with."""
    return config.load(run.folder / RECIPE, Recipe)


def mixture_of(run: Run) -> MixtureConfig | None:
    """The mixture that a run goes on with."""
    changes = _changes(run)
    return changes[-1][1] if changes else _first_mixture(run)


def segments_of_run(run: Run) -> tuple[Segment, ...]:
    """All segments of a run, past and planned; none for one without a mixture."""
    first, changes = _first_mixture(run), _changes(run)
    if first is None and not changes:
        return ()
    section = recipe_of(run).train
    segments = planned(first, section)
    for step, mixture in changes:
        segments = changed(segments, planned(mixture, section), step)
    return segments


def settle(run: Run, recipe: Recipe, new_segment: bool) -> None:
    """Let a recipe's other mixture begin at the run's last good checkpoint, as a recorded segment.

    Nothing if it is the one that the run goes on with. Raises ConflictError if another one was not asked for.
    """
    before, after = mixture_of(run), recipe.mixture
    if before == after:
        return
    told = f"The run {run.id} has the mixture {describe(before)}; the recipe says {describe(after)}."
    if after is None:
        raise ConflictError(
            f"{told} A run does not go back to no mixture.",
            hint="Name weights, or give the recipe another name, so that it becomes a run of its own.",
        )
    if not new_segment:
        raise ConflictError(
            told,
            hint="`lapis train RECIPE --new-segment` goes on with it from the last checkpoint; or give the recipe "
            "another name, so that it becomes a run of its own.",
        )
    with run.hold():
        checkpoint, _ = newest(run.checkpoints)
        run.events.write(
            SEGMENT,
            from_step=0 if checkpoint is None else checkpoint.step,
            mixture=after.model_dump(mode="json", exclude_none=True),
            digest=after.digest(),
            before=None if before is None else before.digest(),
        )


def follow(run: Run, objective: Objective) -> tuple[Segment, ...]:
    """Let an objective take its data in the order of a run's segments."""
    segments = segments_of_run(run)
    if isinstance(objective, Pretraining):
        objective.follow(segments)
    return segments


def segments_before(segments: Sequence[Segment], step: int) -> dict[str, Any]:
    """What a checkpoint keeps of the segments that its steps have seen; nothing without a mixture."""
    return {"segments": [one.plain() for one in segments if one.from_step < step]} if segments else {}


def check_segments(state: Mapping[str, Any], segments: Sequence[Segment], folder: Path) -> None:
    """Raise ConflictError if a checkpoint has seen other segments than the run's record tells."""
    told = segments_before(segments, state["step"]).get("segments", [])
    if state.get("segments", []) != told:
        raise ConflictError(
            f"The checkpoint {folder} has seen the segments {state.get('segments', [])}, the run's events tell {told}.",
            hint="The run's recipe.toml or events.jsonl was changed: restore it, or begin a new run.",
        )


def shares(run: Run) -> list[Share]:
    """What a run has seen of each source of its mixture until its last step; empty without a mixture."""
    segments, steps = segments_of_run(run), run.steps()
    windows = [event["windows"] for event in run.events.read("start") if "windows" in event]
    if not segments or not windows:
        return []
    section = recipe_of(run).train
    order = MixedOrder(windows[-1], segments, batch=section.batch, seed=section.seed)
    place = steps[-1]["step"] * section.batch if steps else 0
    seen = order.consumed(max(place, order.first))
    total = max(1, sum(seen.values()))
    return [
        Share(name, count * section.sequence, count / total, count / max(1, windows[-1][name]))
        for name, count in seen.items()
    ]


def _first_mixture(run: Run) -> MixtureConfig | None:
    """What the run began with. Of another version's recipe without a mixture nothing else needs to be understood."""
    values = tomllib.loads(run.recipe_text).get("data", {})
    return recipe_of(run).mixture if "mixture" in values else None


def _changes(run: Run) -> list[tuple[int, MixtureConfig]]:
    return [
        (event["from_step"], config.parse(event["mixture"], MixtureConfig, where=f"{run.id}: a segment"))
        for event in run.events.read(SEGMENT)
    ]
