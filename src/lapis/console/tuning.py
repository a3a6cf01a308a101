"""Fine-tuning: jobs of the project, asked for here, watched while they train."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from lapis.api.body import parse
from lapis.api.protocol.fine_tuning import FineTuningJobObject, FineTuningRequest
from lapis.api.routes.fine_tuning import create_job
from lapis.console.chart import Chart, Points, thinned
from lapis.console.field import Field
from lapis.console.parts import Facts, Text, button, confirm, link, panel
from lapis.console.samples import Samples
from lapis.console.table import Cell, Column, Row, Table, Tone
from lapis.console.view import PATH, View, when
from lapis.errors import InputError, LapisError, NotFoundError
from lapis.gateway.fine_tuning import ENDED, WORKING, FineTuningJob
from lapis.home import Home
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope
from lapis.train.run import Run

SHOWN = 100
TOLD = 5000  # events of a job
JOBS = (
    Column("id", "Job", "id"),
    Column("status", "State"),
    Column("base", "Trained on"),
    Column("method", "Method"),
    Column("model", "Model"),
    Column("created", "Created (UTC)", "time"),
    Column("finished", "Finished (UTC)", "time"),
)
EVENTS = (Column("at", "At (UTC)", "time"), Column("level", "Level"), Column("message", "What"))
CHECKPOINTS = (
    Column("step", "Step", "number"),
    Column("model", "Model"),
    Column("loss", "Training loss", "number"),
    Column("valid", "Validation loss", "number"),
    Column("at", "Written (UTC)", "time"),
)
TONES: dict[str, Tone] = {
    "validating_files": "busy",
    "queued": "idle",
    "running": "busy",
    "paused": "warn",
    "succeeded": "good",
    "failed": "bad",
    "cancelled": "idle",
}
LEVELS: dict[str, Tone] = {"info": "idle", "warn": "warn", "error": "bad"}
METHODS = {
    "supervised": "supervised: answer as the examples do",
    "dpo": "dpo: prefer one answer to another",
    "reinforcement": "reinforcement: earn what a grader gives",
}
GRADER = {
    "type": "string_check",
    "name": "exact",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}
LOSSES = {"train_loss": "training", "valid_loss": "validation", "full_valid_loss": "whole validation set"}
QUALITIES = {
    "train_mean_token_accuracy": "training",
    "valid_mean_token_accuracy": "validation",
    "full_valid_mean_token_accuracy": "whole validation set",
    "train_reward_mean": "training reward",
    "valid_reward_mean": "validation reward",
}


def jobs_table() -> Table:
    """The table of a project's jobs, still empty."""
    return Table(
        "Fine-tuning jobs", JOBS, "No job yet. Start one here, or with", "client.fine_tuning.jobs.create"
    )


def job_rows(view: View) -> list[Row]:
    """The last jobs of the session's project."""
    found, _ = view.services.fine_tuning.list(view.identity.project_id, limit=SHOWN)
    return [_row(job) for job in found]


async def show_form(view: View) -> None:
    """Draw the page that asks for a job."""
    found, _ = await asyncio.to_thread(
        view.services.files.list, view.identity.project_id, purpose="fine-tune", limit=SHOWN
    )
    files = {file.id: f"{file.filename} ({file.id})" for file in found}
    bases = {
        servable.name: servable.name
        for servable, _ in view.services.router.models(view.identity)
        if servable.base is None
    }
    if not files:
        view.say(
            "There is no file to train on yet.", "warn", "Upload one at Files, with the purpose fine-tune."
        )
        link("To the files", f"{PATH}/files", "button")
        return
    _Form(view, files, bases)


class _Form:
    """The fields of a job."""

    def __init__(self, view: View, files: dict[str, str], bases: dict[str, str]) -> None:
        self.view = view
        chosen = ui.context.client.request.query_params.get("file", "")
        with panel("Fine-tune a model"), ui.element("div").classes("form"):
            self.model = Field("Model", "select", next(iter(bases), ""), options=bases)
            first = chosen if chosen in files else next(iter(files))
            self.file = Field("Training file", "select", first, options=files)
            self.validation = Field("Validation file", "select", "", options={"": "none", **files})
            self.method = Field(
                "Method", "select", "supervised", options=METHODS, on_change=self._method_chosen
            )
            self.epochs = Field("Epochs", "number", "", placeholder="auto", min=1, max=100)
            self.batch = Field("Batch size", "number", "", placeholder="auto", min=1)
            self.rate = Field("Learning rate multiplier", "number", "", placeholder="auto", min=0, step="any")
            self.beta = Field("Beta", "number", "", placeholder="auto", min=0, step="any")
            self.suffix = Field("Suffix", placeholder="part of the model's name")
            self.seed = Field("Seed", "number", "", placeholder="random", min=0)
            self.grader = Field("Grader (JSON)", "area", json.dumps(GRADER, indent=2), rows=7).classes("wide")
            button("Start", self._start, "main")
        self._method_chosen()

    def _method_chosen(self) -> None:
        self.beta.set_visibility(self.method.value == "dpo")
        self.grader.set_visibility(self.method.value == "reinforcement")

    def body(self) -> bytes:
        """What the API would be sent. Raises InputError."""
        kind = str(self.method.value)
        numbers = {
            "n_epochs": self.epochs.whole(lowest=1),
            "batch_size": self.batch.whole(lowest=1),
            "learning_rate_multiplier": self.rate.number(lowest=0),
            "beta": self.beta.number(lowest=0) if kind == "dpo" else None,
        }
        method: dict[str, Any] = {
            "hyperparameters": {name: value for name, value in numbers.items() if value is not None}
        }
        if kind == "reinforcement":
            method["grader"] = _json(self.grader)
        asked = {
            "model": self.model.value,
            "training_file": self.file.value,
            "validation_file": self.validation.value or None,
            "method": {"type": kind, kind: method},
            "suffix": self.suffix.text or None,
            "seed": self.seed.whole(),
        }
        return json.dumps({name: value for name, value in asked.items() if value is not None}).encode()

    async def _start(self) -> None:
        try:
            body = self.body()
        except LapisError as error:
            self.view.complain(error)
            return

        def create(identity: Identity) -> FineTuningJobObject:
            return create_job(self.view.services, identity, parse(body, FineTuningRequest))

        made = await self.view.act(Scope.WORK_WRITE, create)
        if made is not None:
            ui.navigate.to(f"/training/fine-tune/{made.id}")


async def show_job(view: View, job_id: str) -> None:
    """Draw the page of one job."""
    await asyncio.to_thread(view.services.fine_tuning.get, view.identity.project_id, job_id)
    page = _JobPage(view, job_id)
    await view.repeat(page.look)


class _JobPage:
    """One job, as it goes on."""

    def __init__(self, view: View, job_id: str) -> None:
        self.view, self.job_id = view, job_id
        with ui.element("div").classes("head"):
            Text(job_id, "h2")
            with ui.element("div").classes("row"):
                self.status = Text("").classes("tone")
                self.chat = link("Chat with it", "", "button main")
                self.pause = button("Pause", lambda: self._do("pause", "The job is being paused."))
                self.resume = button("Resume", lambda: self._do("resume", "The job goes on."))
                self.cancel = button("Cancel", self._ask_to_cancel, "danger")
        self.facts = Facts()
        with panel("Curves", silent=True), ui.element("div").classes("split"):
            self.losses = Chart("Loss", from_zero=False)
            self.qualities = Chart("Token accuracy and reward")
        self.samples = Samples()
        self.checkpoints = Table("Checkpoints", CHECKPOINTS, "No checkpoint yet.")
        self.events = Table("Events", EVENTS, "Nothing was told yet.")

    async def look(self) -> None:
        """Show the job as it is now."""
        store, project = self.view.services.fine_tuning, self.view.identity.project_id
        job = await asyncio.to_thread(store.get, project, self.job_id)
        self._put_state(job)
        told = (await asyncio.to_thread(store.events, project, self.job_id, None, TOLD)).rows
        self.events.fill([_event(row) for row in told if row.type == "message"])
        metrics = [json.loads(row.data) for row in reversed(told) if row.type == "metrics"]
        self.losses.put(_curves(metrics, LOSSES))
        qualities = _curves(metrics, QUALITIES)
        self.qualities.set_visibility(bool(qualities))
        self.qualities.put(qualities)
        self.samples.fill(await asyncio.to_thread(written, self.view.services.home, job))
        kept = (await asyncio.to_thread(store.checkpoints, project, self.job_id, None, SHOWN)).rows
        self.checkpoints.fill([_checkpoint(row) for row in kept])

    def _put_state(self, job: FineTuningJob) -> None:
        self.status.text = job.status.replace("_", " ")
        self.status.classes(replace=f"tone {TONES[job.status]}")
        may = self.view.may(Scope.WORK_WRITE)
        self.pause.set_visibility(may and job.status in WORKING)
        self.resume.set_visibility(may and job.status == "paused")
        self.cancel.set_visibility(may and job.status not in ENDED)
        model = job.progress.get("fine_tuned_model")
        self.chat.set_visibility(model is not None)
        self.chat.props["href"] = f"{PATH}/playground?model={model}"
        self.facts.fill(_facts(job))

    async def _do(self, act: str, said: str) -> None:
        store = self.view.services.fine_tuning

        def work(identity: Identity) -> FineTuningJob:
            done: FineTuningJob = getattr(store, act)(
                identity.project_id, self.job_id, self.view.session.actor()
            )
            return done

        if await self.view.act(Scope.WORK_WRITE, work, said) is not None:
            await self.look()

    def _ask_to_cancel(self) -> None:
        confirm(
            "Cancel this job?",
            "It ends for good. The checkpoints that it has made stay.",
            "Cancel the job",
            lambda: self._do("cancel", "The job is cancelled."),
        )


def written(home: Home, job: FineTuningJob) -> Sequence[Mapping[str, Any]]:
    """What the model of a job wrote while it was trained; nothing before it trains, or where its run is elsewhere."""
    try:
        return Run.open(home, job.progress["run"]).samples() if "run" in job.progress else ()
    except NotFoundError:
        return ()


def _row(job: FineTuningJob) -> Row:
    cells = {
        "id": Cell(job.id, href=f"{PATH}/training/fine-tune/{job.id}"),
        "status": Cell(job.status.replace("_", " "), tone=TONES[job.status]),
        "base": job.request.model,
        "method": job.request.kind,
        "model": job.progress.get("fine_tuned_model"),
        "created": when(job.created_at),
        "finished": when(job.finished_at),
    }
    return Row(job.id, cells)


def _facts(job: FineTuningJob) -> dict[str, str]:
    request, progress = job.request, job.progress
    plan = progress.get("plan") or {}
    ends = progress.get("estimated_finish") if job.status == "running" else None
    asked = {name: plan.get(name, value) for name, value in request.hyperparameters.items()}
    tokens = progress.get("trained_tokens")
    return {
        "Wrong": str((progress.get("error") or {}).get("message", "")),
        "Model": str(progress.get("fine_tuned_model") or ""),
        "Trained on": request.base,
        "Method": request.kind,
        "Training file": request.training_file,
        "Validation file": request.validation_file or "",
        "Settings": ", ".join(f"{name} {value}" for name, value in asked.items()),
        "Seed": str(request.seed),
        "Tokens": "" if tokens is None else f"{tokens:,}",
        "Created": f"{when(job.created_at)} UTC by {job.created_by}",
        "Likely to finish": f"{when(ends)} UTC" if ends else "",
        "Finished": f"{when(job.finished_at)} UTC" if job.finished_at else "",
    }


def _event(row: Any) -> Row:
    cells = {
        "at": when(row.created_at),
        "level": Cell(row.level, tone=LEVELS[row.level]),
        "message": row.message,
    }
    return Row(row.id, cells)


def _checkpoint(row: Any) -> Row:
    metrics = json.loads(row.metrics)
    valid = metrics.get("full_valid_loss", metrics.get("valid_loss"))
    cells = {
        "step": row.step,
        "model": Cell(row.model, href=f"{PATH}/playground?model={row.model}", hint="Chat with it"),
        "loss": _rounded(metrics.get("train_loss")),
        "valid": _rounded(valid),
        "at": when(row.created_at),
    }
    return Row(row.id, cells)


def _rounded(value: float | None) -> Cell:
    return Cell(value="") if value is None else Cell(f"{value:.4f}", value=value)


def _curves(metrics: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Points]:
    curves = {
        label: thinned([(item["step"], item[name]) for item in metrics if item.get(name) is not None])
        for name, label in names.items()
    }
    return {label: points for label, points in curves.items() if points}


def _json(field: Field) -> Any:
    try:
        return json.loads(field.text)
    except ValueError as error:
        raise InputError(f"{field.label}: it is not JSON: {error}.") from error
