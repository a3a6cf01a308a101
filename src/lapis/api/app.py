"""The HTTP application: OpenAI-shaped routes over the gateway's services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from lapis.api.errors import ErrorObject, add_error_handlers
from lapis.api.idempotency import Idempotency
from lapis.api.inside import InsideApp
from lapis.api.middleware import Envelope
from lapis.api.routes import (
    audit_logs,
    batches,
    chat,
    completions,
    embeddings,
    evals,
    files,
    fine_tuning,
    graders,
    health,
    limits,
    missing,
    models,
    moderations,
    organization,
    permissions,
    projects,
    responses,
    tokens,
    uploads,
    usage,
)
from lapis.gateway.loops import keep_running
from lapis.gateway.services import Services

ROUTES = (
    chat.router,
    completions.router,
    responses.router,
    embeddings.router,
    moderations.router,
    models.router,
    files.router,
    uploads.router,
    batches.router,
    graders.router,
    fine_tuning.router,
    permissions.router,
    organization.router,
    projects.router,
    evals.router,
    limits.router,
    usage.router,
    audit_logs.router,
    tokens.router,
    health.router,
    missing.router,  # last: it answers what none of the others does
)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorObject, "description": "OpenAI's error object"} for status in ("4XX", "5XX")
}


def create_app(services: Services) -> FastAPI:
    """An ASGI app; who makes it also closes the services."""
    app = FastAPI(
        title="Lapis",
        description="OpenAI-compatible API of Lapis.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        lifespan=_lifespan,
    )
    app.state.services = services
    app.state.pages = "/v1"  # below which an eval run is looked at: where there is a console, its pages
    add_error_handlers(app)
    app.add_middleware(Idempotency, services=services)
    app.add_middleware(Envelope, services=services)
    for router in ROUTES:
        app.include_router(router)
    services.post = InsideApp(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """What goes on beside the requests runs as long as the server does."""
    services: Services = app.state.services
    running = [asyncio.create_task(keep_running(loop)) for loop in services.loops]
    try:
        yield
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
