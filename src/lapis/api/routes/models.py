"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

from fastapi import APIRouter

from lapis.api.auth import Reader, ServicesOf
from lapis.api.protocol.models import ModelList, ModelObject
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
