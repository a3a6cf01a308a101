"""OpenAI's objects for fine-tuning: jobs, their events and checkpoints, and who may use the models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from sqlalchemy.engine import Row

from lapis.api.protocol.generation import Body
from lapis.api.protocol.lists import Listed
from lapis.api.protocol.metadata import Metadata
from lapis.gateway.fine_tuning import FineTuningJob
from lapis.gateway.hyperparameters import Kind

SUFFIX = re.compile(r"[A-Za-z0-9._-]{1,64}")
Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1, le=10_000)] | Auto | None
Epochs = Annotated[int, Field(ge=1, le=100)] | Auto | None
Multiplier = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Auto | None
Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]


class SupervisedHyperparameters(Body):
    """How long and how fast is learnt."""

    batch_size: Count = None
    learning_rate_multiplier: Multiplier = None
    n_epochs: Epochs = None

    def given(self) -> dict[str, Any]:
        """What was asked for, by name; what was left out is "auto"."""
        values = self.model_dump(exclude=set(IGNORED))
        return {name: "auto" if value is None else value for name, value in values.items()}


class DpoHyperparameters(SupervisedHyperparameters):
    """`beta` holds the model to where it started."""

    beta: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | Auto | None = None


class ReinforcementHyperparameters(SupervisedHyperparameters):
    """`compute_multiplier` is for the number of answers to a prompt, `eval_interval` in steps."""

    compute_multiplier: Annotated[float, Field(ge=0.25, le=8, allow_inf_nan=False)] | Auto | None = None
    eval_interval: Count = None
    eval_samples: Literal[1, "auto"] | None = (
        None  # a held-out prompt is answered once, by the likeliest tokens
    )
    reasoning_effort: Literal["default"] | None = None


IGNORED = ("eval_samples", "reasoning_effort")


class SupervisedMethod(Body):
    """To answer as the examples do."""

    hyperparameters: SupervisedHyperparameters | None = None


class DpoMethod(Body):
    """To prefer one answer to another."""

    hyperparameters: DpoHyperparameters | None = None


class ReinforcementMethod(Body):
    """To earn what a grader gives."""

    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters | None = None


class Method(Body):
    """One of the three ways to learn."""

    type: Kind
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: ReinforcementMethod | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        others = {"supervised", "dpo", "reinforcement"} - {self.type}
        wrong = next((name for name in sorted(others) if getattr(self, name) is not None), None)
        if wrong is not None:
            raise ValueError(f"type is {self.type!r}, but {wrong!r} is given")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("'reinforcement' is required: it names the grader")
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """What was asked for, by name."""
        if self.type == "dpo":
            return ((self.dpo and self.dpo.hyperparameters) or DpoHyperparameters()).given()
        if self.type == "reinforcement":
            found = self.reinforcement and self.reinforcement.hyperparameters
            return (found or ReinforcementHyperparameters()).given()
        return ((self.supervised and self.supervised.hyperparameters) or SupervisedHyperparameters()).given()


class FineTuningRequest(Body):
    """The body of POST /v1/fine_tuning/jobs."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: Annotated[str, Field(min_length=1, max_length=256)]
    validation_file: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    method: Method | None = None
    hyperparameters: SupervisedHyperparameters | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    suffix: str | None = None
    metadata: Metadata = Field(default_factory=dict)
    integrations: list[Any] | None = None

    @field_validator("suffix")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and not SUFFIX.fullmatch(value):
            raise ValueError("has 1 to 64 letters, digits, dots, dashes and underscores")
        return value

    @field_validator("integrations")
    @classmethod
    def _none(cls, value: list[Any] | None) -> None:
        if value:
            raise ValueError("integrations are not offered: events and step_metrics.csv have the metrics")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.method is not None and self.hyperparameters is not None:
            raise ValueError("give the hyperparameters in 'method', not beside it")
        return self

    @property
    def kind(self) -> Kind:
        """The method's name."""
        return "supervised" if self.method is None else self.method.type

    def asked(self) -> dict[str, Any]:
        """The hyperparameters, by name."""
        if self.method is not None:
            return self.method.hyperparameters()
        return (self.hyperparameters or SupervisedHyperparameters()).given()


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """As they were asked for; once that is decided, what "auto" stands for."""

    batch_size: int | Auto
    learning_rate_multiplier: float | Auto
    n_epochs: int | Auto


class FineTuningJobObject(Listed):
    """A job. One that is paused says `queued` (OpenAI's type knows no other word) and since when it is."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: JobHyperparameters
    integrations: list[Any]
    metadata: dict[str, str]
    method: dict[str, Any]
    model: str
    organization_id: str
    paused_at: int | None
    result_files: list[str]
    seed: int
    status: Status
    suffix: str | None
    trained_tokens: int | None
    training_file: str
    validation_file: str | None


class EventObject(Listed):
    """Something that a job told."""

    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    """What was measured at a step; of reinforcement also rewards."""

    model_config = ConfigDict(extra="allow")

    step: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class CheckpointObject(Listed):
    """A checkpoint whose model can be used."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class PermissionRequest(Body):
    """The body of POST /v1/fine_tuning/checkpoints/{model}/permissions."""

    project_ids: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=1)]


class PermissionObject(Listed):
    """That a project may use another one's model."""

    object: Literal["checkpoint.permission"] = "checkpoint.permission"
    created_at: int
    project_id: str


def job_object(job: FineTuningJob) -> FineTuningJobObject:
    """A job as OpenAI's object."""
    request, progress = job.request, job.progress
    decided = {**request.hyperparameters, **_decided(request.hyperparameters, progress.get("plan"))}
    method: dict[str, Any] = {"hyperparameters": decided}
    if request.grader is not None:
        method["grader"] = dict(request.grader)
    ends = progress.get("estimated_finish") if job.status == "running" else None
    return FineTuningJobObject(
        id=job.id,
        created_at=int(job.created_at),
        error=None if "error" not in progress else JobError(**progress["error"]),
        estimated_finish=None if ends is None else int(ends),
        fine_tuned_model=progress.get("fine_tuned_model"),
        finished_at=None if job.finished_at is None else int(job.finished_at),
        hyperparameters=JobHyperparameters(
            **{name: decided[name] for name in JobHyperparameters.model_fields}
        ),
        integrations=[],
        metadata=dict(job.metadata or {}),
        method={"type": request.kind, request.kind: method},
        model=request.model,
        organization_id=request.organization_id,
        paused_at=None if job.paused_at is None else int(job.paused_at),
        result_files=progress.get("result_files", []),
        seed=request.seed,
        status="queued" if job.status == "paused" else job.status,
        suffix=request.suffix,
        trained_tokens=progress.get("trained_tokens") if job.status == "succeeded" else None,
        training_file=request.training_file,
        validation_file=request.validation_file,
    )


def event_object(row: Row[Any]) -> EventObject:
    """An event as OpenAI's object."""
    return EventObject(
        id=row.id,
        created_at=int(row.created_at),
        level=row.level,
        message=row.message,
        type=row.type,
        data=json.loads(row.data),
    )


def checkpoint_object(row: Row[Any]) -> CheckpointObject:
    """A checkpoint as OpenAI's object."""
    return CheckpointObject(
        id=row.id,
        created_at=int(row.created_at),
        fine_tuned_model_checkpoint=row.model,
        fine_tuning_job_id=row.job_id,
        metrics=CheckpointMetrics(**json.loads(row.metrics)),
        step_number=row.step,
    )


def permission_object(row: Row[Any]) -> PermissionObject:
    """A permission as OpenAI's object."""
    return PermissionObject(id=row.id, created_at=int(row.created_at), project_id=row.project_id)


def _decided(asked: Mapping[str, Any], plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """What "auto" stands for, of what a plan tells."""
    return {name: plan[name] for name in asked if name in plan} if plan else {}
