"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from lapis.api.answer import new_id
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.embeddings import Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from lapis.api.rate_limits import limit_headers
from lapis.api.streaming import while_connected
from lapis.errors import InputError
from lapis.gateway.embedding import embed
from lapis.gateway.services import Services
from lapis.inference.engine import Engine, prompt_ids
from lapis.tenants.keys import Identity

router = APIRouter()
Body = Annotated[EmbeddingRequest, Depends(json_body(EmbeddingRequest))]


@router.post("/v1/embeddings", response_model=EmbeddingList, openapi_extra=json_schema(EmbeddingRequest))
async def create_embeddings(request: Request, services: ServicesOf, caller: User, body: Body) -> Response:
    """One vector for each text. A client that hangs up stops the work."""
    return await while_connected(request.receive, _answer(services, caller, body))


async def _answer(services: Services, caller: Identity, body: EmbeddingRequest) -> Response:
    deployment = services.router.find(body.model, caller)
    engine = await deployment.engine()
    _check_dimensions(engine, body)
    texts = await asyncio.to_thread(_ids, engine, body)
    vectors, usage, limits = await embed(
        new_id("embd"), caller, body.model, texts, body.pooling or "mean",
        deployment, services.meter, services.counters,
    )  # fmt: skip
    write = _base64 if body.encoding_format == "base64" else list
    data = [Embedding(index=index, embedding=write(vector)) for index, vector in enumerate(vectors)]
    used = EmbeddingUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.total_tokens)
    answer = EmbeddingList(data=data, model=body.model, usage=used)
    return Response(answer.model_dump_json(), headers=limit_headers(limits), media_type="application/json")


def _check_dimensions(engine: Engine, body: EmbeddingRequest) -> None:
    """Before anything is computed and paid for. An engine that makes no embeddings says so itself."""
    size = engine.vector_width
    if size is not None and body.dimensions not in (None, size):
        raise InputError(
            f"dimensions = {body.dimensions}: the vectors of this model have {size}, which cannot be changed.",
            param="dimensions",
        )


def _ids(engine: Engine, body: EmbeddingRequest) -> list[tuple[int, ...]]:
    return [tuple(prompt_ids(engine, text)) if isinstance(text, str) else text for text in body.input]


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
