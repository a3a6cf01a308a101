"""POST /v1/moderations."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Response

from lapis.api.answer import new_id
from lapis.api.auth import ServicesOf, User
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.moderations import OPENAIS, Judgement, ModerationObject, ModerationRequest, judgement
from lapis.api.rate_limits import limit_headers
from lapis.errors import NotFoundError, nearest
from lapis.gateway.moderation import Moderator
from lapis.tenants.usage import Usage

router = APIRouter()
Body = Annotated[ModerationRequest, Depends(json_body(ModerationRequest))]


@router.post("/v1/moderations", openapi_extra=json_schema(ModerationRequest))
async def create_moderation(
    services: ServicesOf, caller: User, body: Body, response: Response
) -> ModerationObject:
    """Judge texts. The answer's `model` says what judged them, whatever model of OpenAI's was asked for."""
    moderator = services.moderator
    if body.model not in (None, moderator.name, *OPENAIS):
        raise NotFoundError(
            f"There is no model {body.model!r} for moderation here. {nearest(body.model, [moderator.name])}".strip(),
            param="model",
        )
    words = sum(len(text.split()) for text in body.input)  # what it reads, in its own unit
    meterage = await services.meter.reserve(caller, moderator.name, words, operation="moderations")
    try:
        results = await asyncio.to_thread(_judge, moderator, body.input)
    except BaseException:
        meterage.settle(Usage(0, 0))
        raise
    meterage.settle(Usage(words, 0))
    response.headers.update(limit_headers(meterage.limits))
    return ModerationObject(id=new_id("modr"), model=moderator.name, results=results)


def _judge(moderator: Moderator, texts: list[str]) -> list[Judgement]:
    return [judgement(moderator.scores(text)) for text in texts]
