"""GET /v1/models, GET and DELETE /v1/models/{name}."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from lapis.api.auth import Reader, ServicesOf, Worker
from lapis.api.protocol.lists import Deleted
from lapis.api.protocol.models import ModelList, ModelObject
from lapis.errors import NotFoundError
from lapis.gateway.deployment import Deployment
from lapis.release.registry import Servable

router = APIRouter()


@router.get("/v1/models")
async def list_models(services: ServicesOf, caller: Reader) -> ModelList:
    """Every model that the caller may use. Facts of its engine are null until it is loaded, at its first use."""
    served = services.router.models(caller)
    return ModelList(data=[_describe(servable, deployment) for servable, deployment in served])


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, services: ServicesOf, caller: Reader) -> ModelObject:
    """One model by name."""
    servable, deployment = services.router.lookup(name, caller)
    return _describe(servable, deployment)


@router.delete("/v1/models/{name:path}")
async def delete_model(name: str, services: ServicesOf, caller: Worker) -> Deleted:
    """Remove a model that the project has fine-tuned; no other can be removed here."""
    servable, _ = services.router.lookup(name, caller)
    try:
        await asyncio.to_thread(services.fine_tuned.delete, caller.project_id, name, caller.actor)
    except NotFoundError as error:  # it is visible, and not the project's own
        what = "another project's" if servable.kind == "fine_tuned" else f"a {servable.kind} model"
        raise HTTPException(
            403, f"{name!r} is {what}: only a project's own fine-tuned models are deleted here."
        ) from error
    services.router.refresh()
    return Deleted(id=name, object="model")


def _describe(servable: Servable, deployment: Deployment) -> ModelObject:
    engine = deployment.loaded
    facts = engine.stats() if engine else {}
    return ModelObject(
        id=servable.name,
        created=int(servable.created_at or deployment.since),
        owned_by=servable.owner,
        digest=servable.digest,
        kind=servable.kind,
        parent=servable.base,
        licence=servable.licence,
        loaded=engine is not None,
        context=engine.context if engine else None,
        bit_exact=engine.bit_exact if engine else None,
        kernels=facts.get("kernels"),
        replay=facts.get("replay"),
        weights=facts.get("weights"),
        cache_dtype=facts.get("cache_dtype"),
    )
