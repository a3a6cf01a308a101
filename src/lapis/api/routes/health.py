"""GET /health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from lapis.api.auth import Reader, ServicesOf

router = APIRouter()


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process answers; asks for no key and tells nothing else."""
    return {"status": "ok"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(services: ServicesOf, caller: Reader) -> Response:
    """Counters since the start, and the gauges of every loaded engine, in Prometheus' text format."""
    engines = {
        servable.name: deployment.loaded.stats()
        for servable, deployment in services.router.models()
        if deployment.loaded is not None
    }
    text = services.counters.prometheus(engines)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
