"""/v1/evals: what is measured; /v1/evals/{id}/runs: measuring it, item by item."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request

from lapis.api.auth import ServicesOf, Viewer, Worker
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.evals import (
    EvalCreateRequest,
    EvalDeleted,
    EvalObject,
    EvalRunDeleted,
    EvalRunObject,
    EvalRunRequest,
    EvalUpdateRequest,
    JsonlSource,
    OutputItemObject,
    criteria_of,
    eval_object,
    item_object,
    run_object,
)
from lapis.api.protocol.lists import After, Limit, ListPage, Ordered, list_page
from lapis.evaluate.graders.grader import texts_of
from lapis.evaluate.graders.python_grader import PythonSandbox
from lapis.evaluate.graders.template import item_names
from lapis.gateway.eval_runs import EvalRun
from lapis.gateway.eval_source import count_rows
from lapis.gateway.evals import Eval
from lapis.gateway.item_schema import ItemSchema
from lapis.gateway.services import Services
from lapis.tenants.keys import Identity

router = APIRouter(prefix="/v1/evals")
Create = Annotated[EvalCreateRequest, Depends(json_body(EvalCreateRequest))]
Update = Annotated[EvalUpdateRequest, Depends(json_body(EvalUpdateRequest))]
RunCreate = Annotated[EvalRunRequest, Depends(json_body(EvalRunRequest))]
OrderBy = Annotated[Literal["created_at", "updated_at"], Query()]
RunStatus = Annotated[Literal["queued", "in_progress", "completed", "canceled", "failed"] | None, Query()]
ItemStatus = Annotated[Literal["pass", "fail"] | None, Query()]


@router.post("", openapi_extra=json_schema(EvalCreateRequest))
async def create_eval(services: ServicesOf, caller: Worker, body: Create) -> EvalObject:
    """Make an eval; its schema, graders, models and programs are checked now."""
    config = body.data_source_config
    schema = await asyncio.to_thread(ItemSchema, config.item_schema)
    for criterion in body.testing_criteria:
        names = {name for text in texts_of(criterion) for name in item_names(text)}
        schema.check_names(names, f"The criterion {criterion.name!r}")
    with PythonSandbox() as sandbox:
        for criterion in body.testing_criteria:
            await services.graders.check(caller, criterion, sandbox)
    made = await asyncio.to_thread(
        services.evals.create,
        caller.project_id,
        body.name,
        config.item_schema,
        config.include_sample_schema,
        criteria_of(body),
        body.metadata,
    )
    return eval_object(made)


@router.get("")
def list_evals(
    services: ServicesOf,
    caller: Viewer,
    after: After = None,
    limit: Limit = 20,
    order: Ordered = "asc",
    order_by: OrderBy = "created_at",
) -> ListPage[EvalObject]:
    """The project's evals."""
    found, more = services.evals.list(caller.project_id, after=after, limit=limit, order=order, by=order_by)
    return list_page([eval_object(made) for made in found], more)


@router.get("/{eval_id}")
def retrieve_eval(eval_id: str, services: ServicesOf, caller: Viewer) -> EvalObject:
    """An eval."""
    return eval_object(services.evals.get(caller.project_id, eval_id))


@router.post("/{eval_id}", openapi_extra=json_schema(EvalUpdateRequest))
async def update_eval(eval_id: str, services: ServicesOf, caller: Worker, body: Update) -> EvalObject:
    """Change name or metadata."""
    changed = await asyncio.to_thread(
        services.evals.update, caller.project_id, eval_id, body.name, body.metadata
    )
    return eval_object(changed)


@router.delete("/{eval_id}")
def delete_eval(eval_id: str, services: ServicesOf, caller: Worker) -> EvalDeleted:
    """Remove an eval with its runs; those under way end."""
    services.evals.delete(caller.project_id, eval_id)
    return EvalDeleted(eval_id=eval_id)


@router.post("/{eval_id}/runs", openapi_extra=json_schema(EvalRunRequest))
async def create_run(
    eval_id: str, request: Request, services: ServicesOf, caller: Worker, body: RunCreate
) -> EvalRunObject:
    """Queue a run; all its rows are checked now."""
    if not isinstance(body.data_source, JsonlSource):
        services.router.find(body.data_source.model, caller)
    return await asyncio.to_thread(_create_run, eval_id, request, services, caller, body)


@router.get("/{eval_id}/runs")
def list_runs(
    eval_id: str,
    request: Request,
    services: ServicesOf,
    caller: Viewer,
    after: After = None,
    limit: Limit = 20,
    order: Ordered = "asc",
    status: RunStatus = None,
) -> ListPage[EvalRunObject]:
    """An eval's runs."""
    made_of = services.evals.get(caller.project_id, eval_id)
    found, more = services.eval_runs.list(
        caller.project_id, eval_id, status=status, after=after, limit=limit, order=order
    )
    return list_page([_object(run, made_of, request) for run in found], more)


@router.get("/{eval_id}/runs/{run_id}")
def retrieve_run(
    eval_id: str, run_id: str, request: Request, services: ServicesOf, caller: Viewer
) -> EvalRunObject:
    """A run, and how its items have come out so far."""
    made_of = services.evals.get(caller.project_id, eval_id)
    return _object(services.eval_runs.get(caller.project_id, eval_id, run_id), made_of, request)


@router.post("/{eval_id}/runs/{run_id}/cancel")
@router.post("/{eval_id}/runs/{run_id}", include_in_schema=False)  # where older clients cancel
def cancel_run(
    eval_id: str, run_id: str, request: Request, services: ServicesOf, caller: Worker
) -> EvalRunObject:
    """End a run; what it has recorded stays."""
    made_of = services.evals.get(caller.project_id, eval_id)
    return _object(services.eval_runs.cancel(caller.project_id, eval_id, run_id), made_of, request)


@router.delete("/{eval_id}/runs/{run_id}")
def delete_run(eval_id: str, run_id: str, services: ServicesOf, caller: Worker) -> EvalRunDeleted:
    """Remove a run with its items; one under way ends."""
    services.eval_runs.delete(caller.project_id, eval_id, run_id)
    return EvalRunDeleted(run_id=run_id)


@router.get("/{eval_id}/runs/{run_id}/output_items")
def list_items(
    eval_id: str,
    run_id: str,
    services: ServicesOf,
    caller: Viewer,
    after: After = None,
    limit: Limit = 20,
    order: Ordered = "asc",
    status: ItemStatus = None,
) -> ListPage[OutputItemObject]:
    """A run's items, in the order of the data."""
    run = services.eval_runs.get(caller.project_id, eval_id, run_id)
    found, more = services.eval_runs.items(run, status=status, after=after, limit=limit, order=order)
    return list_page([item_object(item, run) for item in found], more)


@router.get("/{eval_id}/runs/{run_id}/output_items/{item_id}")
def retrieve_item(
    eval_id: str, run_id: str, item_id: str, services: ServicesOf, caller: Viewer
) -> OutputItemObject:
    """One item of a run."""
    run = services.eval_runs.get(caller.project_id, eval_id, run_id)
    return item_object(services.eval_runs.item(run, item_id), run)


def _create_run(
    eval_id: str, request: Request, services: Services, caller: Identity, body: EvalRunRequest
) -> EvalRunObject:
    made_of = services.evals.get(caller.project_id, eval_id)
    source = body.data_source.model_dump(mode="json", exclude_unset=True)
    schema = ItemSchema(made_of.item_schema)
    total = count_rows(source["source"], services.files, caller.project_id, schema)
    run = services.eval_runs.create(caller, made_of, body.name, body.metadata, source, total)
    return _object(run, made_of, request)


def _object(run: EvalRun, made_of: Eval, request: Request) -> EvalRunObject:
    pages = request.base_url.replace(path=request.app.state.pages)
    return run_object(run, made_of, f"{pages}/evals/{run.eval_id}/runs/{run.id}")
