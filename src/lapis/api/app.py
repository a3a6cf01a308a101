"""The HTTP application: OpenAI-shaped routes over the gateway's services."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from lapis.api.errors import ErrorObject, add_error_handlers
from lapis.api.middleware import Envelope
from lapis.api.routes import chat, completions, embeddings, health, missing, models, responses, tokens
from lapis.gateway.services import Services

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
    )
    app.state.services = services
    add_error_handlers(app)
    app.add_middleware(Envelope, services=services)
    for module in (chat, completions, responses, embeddings, models, tokens, health, missing):
        app.include_router(module.router)
    return app
