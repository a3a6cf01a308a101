"""The work on a fine-tuning job: files checked, a recipe written, trained, told about, made a model.

It runs in a process that the queue started, and may be killed anywhere: the next one goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lapis import config
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, LapisError, NotFoundError
from lapis.gateway.attempt import Attempt
from lapis.gateway.files import FileStore
from lapis.gateway.fine_tuning import FILES, Event, FineTuningJob, examples_folder, forget_examples
from lapis.gateway.hyperparameters import Hyperparameters, Plan, make_plan
from lapis.home import Home
from lapis.release.registry import Registry, Servable

if TYPE_CHECKING:
    from lapis.data.examples import Kind
    from lapis.train.recipe import Recipe

RANK, ALPHA = 16, 32.0  # of the adapters
SAMPLES = 2  # prompts of the validation file that are answered while it trains, for people to read
WARMUP = 5  # steps, at most a tenth of all


def check(home: Home, job_id: str) -> None:
    """Read a job's files and queue its training, or end it with the first line that is wrong."""
    from lapis.data.examples import is_chat, read_examples

    attempt = Attempt(home, open_database(home.database_url), job_id)
    job = attempt.job()
    kind: Kind = _kind(job)
    counts, chats = {}, False
    for param in FILES:
        with _judged(attempt, job, param):
            path = examples_folder(home, job_id) / param
            given = getattr(job.request, param) is not None
            lines = read_examples([path], kind) if given else []
            counts[param], chats = len(lines), chats or any(is_chat(line.example) for line in lines)
    if chats:
        with _judged(attempt, job, "model"):
            _require_template(_base(Registry(home, attempt.db), job))
    facts = {"examples": counts["training_file"], "validation_examples": counts["validation_file"]}
    attempt.checked(**facts)


def train(home: Home, job_id: str) -> None:
    """Train by a job's recipe, from the last checkpoint if there is one, and register the model.

    Raises KeyboardInterrupt after SIGTERM, when the state is in a checkpoint; ConflictError if the job is not this
    process's any more.
    """
    from lapis.publication import Publication, make_model
    from lapis.train.base import fine_tuning
    from lapis.train.start import checked_shape
    from lapis.train.trainer import find_or_create
    from lapis.train.trainer import train as train_run

    attempt = Attempt(home, open_database(home.database_url), job_id)
    job = attempt.job()
    with _judged(attempt, job, "model"):
        base = _base(Registry(home, attempt.db), job)
    with _judged(attempt, job, "training_file"):
        plan = _plan(home, base, job)
        recipe = make_recipe(home, base, job, plan)
        objective = fine_tuning(recipe, home)
        checked_shape(recipe, objective.tokenizer, home, recipe.mesh(1))
        run = find_or_create(home, recipe, config.to_toml(recipe), objective)
    started = Event("started", "Fine-tuning job started.")
    job = attempt.tell(started, status="running", plan=asdict(plan), run=run.id, licence=base.licence)
    with _judged(attempt, job, None):
        with Publication(attempt, job, plan, run, base):
            train_run(recipe, objective, run)
        make_model(attempt, job, plan, run, base)
    forget_examples(home, job_id)


def make_recipe(home: Home, base: Servable, job: FineTuningJob, plan: Plan) -> Recipe:
    """A plan as the recipe of `lapis train`."""
    from lapis.train.recipe import Recipe

    request, (files, apart) = job.request, _examples(home, job)
    objective = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}[request.kind]
    values: dict[str, Any] = {
        "name": job.id,
        "model": {"from": _source(base)},
        "examples": {"files": files, "heldout": 0.0, "heldout_files": apart},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "train": {
            "objective": objective,
            "steps": plan.steps,
            "batch": plan.batch_size,
            "micro_batch": plan.micro_batch,
            "sequence": plan.sequence,
            "seed": request.seed,
            "optimizer": "adamw",
            "lr": plan.lr,
            "warmup": max(1, min(WARMUP, plan.steps // 10)),
            "dtype": _dtype(base),
            "samples": {"heldout": SAMPLES if apart and objective != "grpo" else 0},
        },
        "checkpoint": {"steps": plan.interval, "every": plan.kept},
    }
    if request.kind == "dpo":
        values["dpo"] = {"beta": plan.beta}
    if request.kind == "reinforcement":
        grpo = {"grader": dict(request.grader or {}), "group": plan.group, "max_tokens": plan.max_tokens}
        values["grpo"] = {**grpo, "beta": plan.beta}
    return config.parse(values, Recipe, where=job.id)


def _plan(home: Home, base: Servable, job: FineTuningJob) -> Plan:
    """What is trained: the one decided before, else by the number of examples and the longest of them."""
    from lapis.data.recipe import ExamplesConfig
    from lapis.gateway.hyperparameters import LEAST_ANSWER
    from lapis.train.base import Base, model_folder

    if "plan" in job.progress:
        return Plan(**job.progress["plan"])
    opened = Base.open(base.name, model_folder(_source(base), home))
    context = opened.stored.config.context
    files, apart = _examples(home, job)
    examples = ExamplesConfig(files=files, heldout=0.0, heldout_files=apart)
    if job.request.kind == "reinforcement":
        prompts = opened.prompts(examples, longest=context, max_tokens=LEAST_ANSWER)
        count, sizes = len(prompts.trained), [len(one.ids) for one in (*prompts.trained, *prompts.heldout)]
    else:
        samples = opened.samples(examples, longest=context, preferences=job.request.kind == "dpo")
        every = (*samples.trained, *samples.heldout)
        count, sizes = len(samples.trained), [len(text.ids) for sample in every for text in sample]
    given = {key: value for key, value in job.request.hyperparameters.items() if value != "auto"}
    return make_plan(job.request.kind, Hyperparameters(**given), count, max(sizes), context)


def _examples(home: Home, job: FineTuningJob) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of what is trained on and of what is only measured, as `check` put them there."""
    folder = examples_folder(home, job.id)
    apart = (str(folder / "validation_file"),) if job.request.validation_file else ()
    return (str(folder / "training_file"),), apart


@contextmanager
def _judged(attempt: Attempt, job: FineTuningJob, param: str | None) -> Iterator[None]:
    """End the job with an error that another try would not get over, and this process with it.

    `param` is the part of the request that is to blame for what cannot be used.
    """
    try:
        yield
    except LapisError as error:
        try:
            attempt.job()
        except ConflictError:  # it is not ours any more: what went wrong here is nobody's concern
            raise error from None
        message = f"{error.message} {error.hint}".strip()
        for name in FILES:
            place = str(examples_folder(attempt.home, job.id) / name)
            if place in message:
                param, message = name, message.replace(place, _label(attempt, job, name))
        param = "model" if error.param == "model" else param
        if isinstance(error, InputError | NotFoundError) and param in FILES:
            attempt.fail(f"invalid_{param}", message, param)
        else:
            attempt.fail(error.code, message, param if param == "model" else None)
        forget_examples(attempt.home, job.id)
        raise


def _label(attempt: Attempt, job: FineTuningJob, param: str) -> str:
    """The name of a file as its owner knows it."""
    id = str(getattr(job.request, param))
    try:
        return FileStore(attempt.home.files, attempt.db).get(job.project_id, id).filename
    except NotFoundError:
        return id


def _base(registry: Registry, job: FineTuningJob) -> Servable:
    """The model to train on. Raises NotFoundError without it, ConflictError if it is another one by now."""
    name, digest = job.request.base, job.request.base_digest
    for servable in registry.servables():
        if servable.name == name:
            if servable.digest != digest:
                raise ConflictError(f"The model {name!r} has other weights than when the job was created.")
            return servable
    raise NotFoundError(f"The model {name!r} is not here any more.")


def _require_template(base: Servable) -> None:
    """Raises InputError if chats cannot be read for a model."""
    from lapis.model import layout

    if layout.read_template(base.folder, layout.read_tokenizer_config(base.folder)) is None:
        raise InputError(
            f"{base.name!r} has no chat template, so that nobody could chat with what it learns from chats.",
            hint='Train it on lines of "prompt" and "completion".',
            param="model",
        )


def _source(base: Servable) -> str:
    return base.name if base.kind == "pulled" else str(base.folder)


def _dtype(base: Servable) -> str:
    """The type that the base is served in, so that what is trained is what is served."""
    from lapis.model.layout import CONFIG, read_json

    return "fp32" if read_json(base.folder / CONFIG).get("torch_dtype") == "float32" else "bf16"


def _kind(job: FineTuningJob) -> Any:
    return {"supervised": "texts", "dpo": "preferences", "reinforcement": "prompts"}[job.request.kind]
