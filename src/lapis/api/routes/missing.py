"""OpenAI's paths that are not offered yet: one sentence each instead of a riddle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from lapis.api.auth import OrganizationReader, Reader
from lapis.tenants.admin_keys import Administrator
from lapis.tenants.keys import Identity

NOT_OFFERED = {
    "responses/compact": "Responses are not compacted.",
    "conversations": "Conversations are not kept on the server; send the messages with each request.",
    "vector_stores": "Vector stores are not offered.",
    "assistants": "Assistants are not offered.",
    "threads": "Threads are not offered.",
    "audio": "Audio is not offered: Lapis serves text models.",
    "images": "Images are not offered: Lapis serves text models.",
    "videos": "Videos are not offered: Lapis serves text models.",
    "realtime": "Realtime sessions are not offered: Lapis serves text models.",
}
ADMINISTRATION = {  # asked for with an admin key
    "organization": "This part of administration is not offered.",
    "projects": "Roles and groups are not offered: users are owners, members or readers.",
}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]

router = APIRouter(include_in_schema=False)


def _refuse(sentence: str) -> Callable[[Identity], Awaitable[None]]:
    async def refuse(caller: Reader) -> None:
        _not_offered(sentence)

    return refuse


def _refuse_administration(sentence: str) -> Callable[[Administrator], Awaitable[None]]:
    async def refuse(caller: OrganizationReader) -> None:
        _not_offered(sentence)

    return refuse


def _not_offered(sentence: str) -> None:
    raise HTTPException(501, sentence, {"x-should-retry": "false"})  # the client repeats 5xx


def _add(group: str, endpoint: Callable[..., Awaitable[None]]) -> None:
    router.add_api_route(f"/v1/{group}", endpoint, methods=METHODS)
    router.add_api_route(f"/v1/{group}/{{rest:path}}", endpoint, methods=METHODS)


for group, sentence in NOT_OFFERED.items():
    _add(group, _refuse(sentence))
for group, sentence in ADMINISTRATION.items():
    _add(group, _refuse_administration(sentence))
