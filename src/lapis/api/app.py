"""The HTTP application: OpenAI-shaped routes over the gateway's services."""

from __future__ import annotations

from fastapi import FastAPI

from lapis.api.errors import add_error_handlers
from lapis.api.middleware import Envelope
from lapis.api.routes import chat, completions, embeddings, health, missing, models, responses, tokens
from lapis.gateway.services import Services


def create_app(services: Services) -> FastAPI:
    """An ASGI app; who makes it also closes the services."""
    app = FastAPI(title="Lapis", description="OpenAI-compatible API of Lapis.", docs_url=None, redoc_url=None)
    app.state.services = services
    add_error_handlers(app)
    app.add_middleware(Envelope, counters=services.counters)
    for module in (chat, completions, responses, embeddings, models, tokens, health, missing):
        app.include_router(module.router)
    return app
