"""A run's weights as a model folder: what releases, evaluation and other programs load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lapis import config
from lapis.checkpoint.folder import listing, verify
from lapis.checkpoint.sharded import Checkpoint, Loaded, latest, load
from lapis.data.shards import Dataset
from lapis.errors import ConflictError, IntegrityError
from lapis.home import Home
from lapis.log import logger
from lapis.model.adapters import Adapter, write_adapter
from lapis.model.config import ModelConfig
from lapis.model.manifest import Source
from lapis.model.weights import DTYPES, read_model, write_model
from lapis.tokenizer.bpe import Tokenizer
from lapis.train.base import Base, check_base, model_folder
from lapis.train.lora import Lora, attach, merged
from lapis.train.recipe import Recipe
from lapis.train.run import RECIPE, Run


@dataclass(frozen=True)
class Exported:
    """A model folder (temporary), the run's evaluation if there is one, and where the weights come from."""

    folder: Path
    report: dict[str, Any] | None
    lineage: dict[str, Any]


@contextmanager
def exported_run(home: Home, run_id: str, *, average: bool = False, best: bool = False) -> Iterator[Exported]:
    """Export the run's last good checkpoint to a temporary model folder, in the type that it was trained in.

    `best` takes the one of the lowest loss on what was held out, `average` the average of the weights. The report is
    there if it measured these weights. Raises NotFoundError, and ConflictError for a run without such a checkpoint.
    """
    run = Run.find(home, run_id)
    checkpoint = best_checkpoint(run) if best else last_checkpoint(run)
    loaded = load(checkpoint)
    if average and "ema" not in loaded.groups:
        raise ConflictError(f"The run {run.id} keeps no average of its weights.", hint="Set train.ema.")
    weights = trained_weights(run, loaded, average=average)
    origin = _of_examples(run) if _recipe(run).data is None else _of_dataset(run)
    lineage = {
        "run": run.id,
        "checkpoint": checkpoint.digest,
        "step": loaded.state["step"],
        "average": average,
        "dataset": loaded.state["data_digest"],
        "tokenizer": origin.tokenizer.digest,
        "licences": origin.licences,
    }
    with tempfile.TemporaryDirectory(prefix="lapis-export-") as temporary:
        folder = Path(temporary) / "model"
        write_model(
            folder,
            weights.config,
            weights.state,
            origin.tokenizer,
            source=Source(kind="run", reference=run.id, licence=origin.licence),
            chat_template=origin.chat_template,
            add_bos=origin.add_bos,
            bos_id=origin.bos_id,
            stop_ids=origin.stop_ids,
            dtype=weights.state["embed"].dtype,
        )
        report = run.evaluation()
        measured = report is not None and report["weights"] == checkpoint.digest and not average
        yield Exported(folder, report if measured else None, lineage)


def export_adapter(run: Run, folder: Path, *, best: bool = False) -> str:
    """Write the adapter of a run's last good checkpoint, or its best, in PEFT's format; returns the base's name.

    Raises ConflictError for a run without adapters or checkpoint, or if the folder holds something.
    """
    weights = trained_weights(run, load(best_checkpoint(run) if best else last_checkpoint(run)))
    if weights.adapter is None:
        raise ConflictError(
            f"The run {run.id} trained whole weights, not an adapter.", hint="Leave --adapter out."
        )
    name = base_of(run).stored.name
    write_adapter(folder, weights.config, weights.adapter, name)
    return name


def adapter_of(run: Run, checkpoint: Checkpoint) -> tuple[ModelConfig, Adapter]:
    """The shape of a run's base and the adapter in one of its checkpoints; the base's weights are not read.

    Raises ConflictError for a run without adapters, IntegrityError for a damaged checkpoint.
    """
    recipe, loaded = _recipe(run), load(checkpoint)
    if recipe.lora is None:
        raise ConflictError(f"The run {run.id} trained whole weights, not an adapter.")
    shape = ModelConfig(**loaded.state["model"])
    lora = Lora(recipe.lora, shape, recipe.train.seed, DTYPES[recipe.train.dtype])
    return shape, _filled(lora, loaded.groups["model"])


def _filled(lora: Lora, state: Mapping[str, Tensor]) -> Adapter:
    lora.load_state_dict({name.removeprefix("lora."): weight for name, weight in state.items()})
    return lora.adapter()


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds as a whole model: an adapter is merged into the model that it was trained beside."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    adapter: Adapter | None


def trained_weights(run: Run, loaded: Loaded, *, average: bool = False) -> Trained:
    """The weights of a run's checkpoint, or their average. Raises ConflictError if the base is another one by now."""
    recipe, shape = _recipe(run), ModelConfig(**loaded.state["model"])
    state = loaded.groups["ema" if average else "model"]
    if recipe.lora is None:
        return Trained(shape, state, None)
    model = read_model(base_of(run).stored.folder, dtype=DTYPES[recipe.train.dtype]).model
    whole = dict(model.state_dict())
    adapter = _filled(attach(model, recipe.lora, recipe.train.seed), state)
    return Trained(shape, merged(whole, adapter), adapter)


def base_of(run: Run) -> Base:
    """The model that a run started from. Raises NotFoundError, and ConflictError if it is another one by now."""
    source = _recipe(run).model.source
    assert source is not None, "only runs that start from a model are asked"
    base = Base.open(source, model_folder(source, Home(run.folder.parent.parent)))
    check_base(run, base.stored.digest)
    return base


def last_checkpoint(run: Run) -> Checkpoint:
    """The last good checkpoint of a run. Raises ConflictError if there is none."""
    checkpoint = latest(run.checkpoints)
    if checkpoint is None:
        raise ConflictError(
            f"The run {run.id} has no checkpoint yet.", hint="`lapis train RECIPE.toml` goes on with it."
        )
    return checkpoint


def best_checkpoint(run: Run) -> Checkpoint:
    """The good checkpoint of the lowest loss on what was held out, the later one of equals. Raises ConflictError."""
    scored = [one for one in listing(run.checkpoints)[0] if one.manifest.score is not None]
    for checkpoint in sorted(scored, key=lambda one: (one.manifest.score, -one.step)):
        try:
            verify(checkpoint)
        except IntegrityError as error:
            logger.warning("checkpoint %s is skipped: %s", checkpoint.folder.name, error.message)
        else:
            return checkpoint
    raise ConflictError(
        f"The run {run.id} has no checkpoint that was measured on what was held out.",
        hint="Train with checkpoint.best = 1, or take the last one: leave --best out.",
    )


def dataset_folder(run: Run) -> Path:
    """Where the dataset lies that a run was trained on.

    Raises ConflictError for a run that never started or that has examples instead.
    """
    started = _start(run)
    if "dataset" not in started:
        raise ConflictError(
            f"The run {run.id} was fine-tuned on examples; it has no dataset of its own.",
            hint=f"Its events tell the loss on held-out examples. On text: lapis models export {run.id} FOLDER, then "
            "lapis evaluate FOLDER --data DATASET",
        )
    return Path(started["dataset"])


class _Origin(NamedTuple):
    """What a model folder tells beside weights: how texts become ids, where they end, whose licence it is."""

    tokenizer: Tokenizer
    chat_template: str | None
    add_bos: bool
    bos_id: int | None
    stop_ids: tuple[int, ...]
    licence: str
    licences: Sequence[Mapping[str, Any]]  # of the training texts


def _of_dataset(run: Run) -> _Origin:
    dataset = Dataset.open(dataset_folder(run))
    licences = dataset.manifest["licences"]
    return _Origin(dataset.tokenizer, None, True, None, (), _licence(licences), licences)


def _of_examples(run: Run) -> _Origin:
    """All as the base has it, but for a template of the recipe's own."""
    base, examples = base_of(run), _recipe(run).examples
    manifest = base.stored.manifest
    chat = base.encoder(examples.template if examples else "").chat
    template = chat.template if chat else None
    ends = (manifest.add_bos, manifest.bos_id, manifest.stop_ids)
    return _Origin(base.tokenizer, template, *ends, base.stored.licence, ())


def _start(run: Run) -> Mapping[str, Any]:
    started = run.events.read("start")
    if not started:
        raise ConflictError(f"The run {run.id} has not started.", hint="`lapis train RECIPE.toml` starts it.")
    return started[-1]


def _recipe(run: Run) -> Recipe:
    return config.load(run.folder / RECIPE, Recipe)


def _licence(table: Sequence[Mapping[str, Any]]) -> str:
    """The weights' licence in words: one for all of the texts, or that they are mixed (the lineage counts them)."""
    names = {str(row["licence"]) for row in table if row["licence"]}
    stated = all(row["licence"] for row in table)
    if len(names) == 1 and stated:
        return names.pop()
    return "mixed: see the licences of the training texts" if names else "unknown"
