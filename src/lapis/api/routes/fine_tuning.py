"""/v1/fine_tuning/jobs: training through the API."""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException

from lapis.api.auth import ServicesOf, Viewer, Worker
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.fine_tuning import (
    CheckpointObject,
    EventObject,
    FineTuningJobObject,
    FineTuningRequest,
    checkpoint_object,
    event_object,
    job_object,
)
from lapis.api.protocol.lists import After, Limit, ListPage, list_page
from lapis.errors import InputError, NotFoundError
from lapis.evaluate.graders.grader import models_of, read_grader
from lapis.gateway import fine_tuning
from lapis.gateway.fine_tuning import NO_METADATA
from lapis.gateway.services import Services
from lapis.release.registry import Servable
from lapis.tenants.keys import Identity

PURPOSE = "fine-tune"
PAIR = re.compile(r"metadata\[(?P<key>[^\]]*)\]")

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Body = Annotated[FineTuningRequest, Depends(json_body(FineTuningRequest))]


@router.post("", openapi_extra=json_schema(FineTuningRequest))
def create_job(services: ServicesOf, caller: Worker, body: Body) -> FineTuningJobObject:
    """Queue the training of adapters on a model: its files are looked at first."""
    base = _base(services, caller, body.model)
    for param in ("training_file", "validation_file"):
        _check_file(services, caller, param, getattr(body, param))
    grader = body.method.reinforcement.grader if body.method and body.method.reinforcement else None
    if grader is not None:
        _check_grader(services, caller, grader)
    request = fine_tuning.Request(
        organization_id=caller.organization_id,
        model=body.model,
        base=base.name,
        base_digest=base.digest,
        training_file=body.training_file,
        validation_file=body.validation_file,
        kind=body.kind,
        hyperparameters=body.asked(),
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        suffix=body.suffix,
        grader=grader,
    )
    return job_object(services.fine_tuning.create(caller.project_id, caller.actor, request, body.metadata))


@router.get("")
def list_jobs(
    request: Request, services: ServicesOf, caller: Viewer, after: After = None, limit: Limit = 20
) -> ListPage[FineTuningJobObject]:
    """The project's jobs, the newest first; those with some metadata, or with none at all (`metadata=null`)."""
    found, has_more = services.fine_tuning.list(
        caller.project_id, after=after, limit=limit, metadata=_filter(request)
    )
    return list_page([job_object(job) for job in found], has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: str, services: ServicesOf, caller: Viewer) -> FineTuningJobObject:
    """One job."""
    return job_object(services.fine_tuning.get(caller.project_id, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, services: ServicesOf, caller: Worker) -> FineTuningJobObject:
    """End a job for good, at a checkpoint."""
    return job_object(services.fine_tuning.cancel(caller.project_id, job_id, caller.actor))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, services: ServicesOf, caller: Worker) -> FineTuningJobObject:
    """Stop a job at a checkpoint, until it is resumed."""
    return job_object(services.fine_tuning.pause(caller.project_id, job_id, caller.actor))


@router.post("/{job_id}/resume")
def resume_job(job_id: str, services: ServicesOf, caller: Worker) -> FineTuningJobObject:
    """Let a paused job go on from its checkpoint."""
    return job_object(services.fine_tuning.resume(caller.project_id, job_id, caller.actor))


@router.get("/{job_id}/events")
def list_events(
    job_id: str, services: ServicesOf, caller: Viewer, after: After = None, limit: Limit = 20
) -> ListPage[EventObject]:
    """What a job told, the newest first."""
    page = services.fine_tuning.events(caller.project_id, job_id, after, limit)
    return list_page([event_object(row) for row in page.rows], page.has_more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, services: ServicesOf, caller: Viewer, after: After = None, limit: Limit = 10
) -> ListPage[CheckpointObject]:
    """The checkpoints of a job that can be used, the newest first."""
    page = services.fine_tuning.checkpoints(caller.project_id, job_id, after, limit)
    return list_page([checkpoint_object(row) for row in page.rows], page.has_more)


def _base(services: Services, caller: Identity, name: str) -> Servable:
    """The model that is trained on; of a release its exact version. Raises NotFoundError, InputError."""
    servable, _ = services.router.lookup(name, caller)
    if servable.base is not None:
        raise InputError(
            f"{name!r} is an adapter of {servable.base!r}; fine-tuning starts from a whole model.",
            hint=f"Start from {servable.base!r}, with the files of both.",
            param="model",
        )
    return servable


def _check_file(services: Services, caller: Identity, param: str, id: str | None) -> None:
    if id is None:
        return
    try:
        file = services.files.get(caller.project_id, id)
    except NotFoundError as error:
        raise NotFoundError(error.message, hint=error.hint, param=param) from error
    if file.purpose != PURPOSE:
        raise InputError(
            f"The file {id} was uploaded for the purpose {file.purpose!r}, not for {PURPOSE!r}.", param=param
        )


def _check_grader(services: Services, caller: Identity, grader: dict[str, object]) -> None:
    """Raise InputError for a grader that cannot be used in training, NotFoundError for a model that is not there."""
    param = "method.reinforcement.grader"
    for name in sorted(models_of(read_grader(grader, param))):
        servable, _ = services.router.lookup(name, caller)
        if servable.kind != "pulled" or servable.base is not None:
            raise InputError(
                f"{name!r} cannot grade in training: only whole pulled models can.", param=f"{param}.model"
            )


def _filter(request: Request) -> dict[str, str] | Literal["null"] | None:
    """`metadata[key]=value` pairs of a query, or `metadata=null`. Raises HTTPException for both."""
    pairs = {
        found["key"]: value
        for name, value in request.query_params.multi_items()
        if (found := PAIR.fullmatch(name))
    }
    if request.query_params.get("metadata") == NO_METADATA:
        if pairs:
            raise HTTPException(400, "metadata=null and metadata[key]=value exclude each other.")
        return "null"
    return pairs or None
