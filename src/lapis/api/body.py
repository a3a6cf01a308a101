"""JSON request bodies, read strictly: what JSON does not allow, or could be read in two ways, is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lapis.errors import InputError, nearest
from lapis.gateway.strict_json import read_json

BODY_LIMIT = 8 * 1024 * 1024  # bytes; a prompt of a million tokens fits
BODY_SECONDS = 60.0  # from the end of the headers
CLOSE = {"connection": "close"}  # the rest of a body that is too large is not read
DROPPED = ("$defs", "discriminator")  # of a schema whose parts are in their places: both only name parts
Model = TypeVar("Model", bound=BaseModel)


def json_body(schema: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A FastAPI dependency: the request's body as `schema`. Raises as `read_body` and `parse`."""

    async def body(request: Request) -> Model:
        return parse(await read_body(request), schema)

    return body


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """What our OpenAPI description says of a body that `json_body` reads."""
    whole = schema.model_json_schema()
    content = {"application/json": {"schema": _inlined(whole, whole.get("$defs", {}))}}
    described = {"requestBody": {"required": True, "content": content}}
    if "stream" not in schema.model_fields:
        return described
    events: dict[str, Any] = {"text/event-stream": {"schema": {}}}
    return {**described, "responses": {"200": {"content": events}}}


async def read_body(request: Request) -> bytes:
    """The raw body. Raises HTTPException: 415 for another type than JSON, 413 above the limit, 408 if slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"The content type must be application/json, not {kind or 'absent'}.")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > BODY_LIMIT:
                    raise HTTPException(413, f"The body is larger than {BODY_LIMIT:,} bytes.", CLOSE)
                parts.append(part)
    except ClientDisconnect as error:
        raise InputError("The client hung up while sending the body.") from error
    except TimeoutError as error:
        raise HTTPException(408, f"The body did not come within {BODY_SECONDS:.0f} s.", CLOSE) from error
    return b"".join(parts)


def parse(raw: bytes, schema: type[Model]) -> Model:
    """JSON bytes as `schema`. Raises InputError with the field's name in `param`."""
    if not raw.strip():
        raise InputError("The body is empty; it must be a JSON object.")
    values = read_json(raw)
    if not isinstance(values, dict):
        raise InputError(f"The body must be a JSON object, not {_kind(values)}.")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explain(error, schema) from error


def _inlined(schema: Any, named: dict[str, Any]) -> Any:
    """A schema with its named parts in their places: a description has no other place for them."""
    if isinstance(schema, list):
        return [_inlined(part, named) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(named[schema["$ref"].removeprefix("#/$defs/")], named)
    return {name: _inlined(part, named) for name, part in schema.items() if name not in DROPPED}


def _explain(error: ValidationError, schema: type[BaseModel]) -> InputError:
    problem = error.errors(include_url=False)[0]
    param = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = schema.model_fields if len(problem["loc"]) == 1 else ()
        name = problem["loc"][-1]
        return InputError(f"Unknown field {param!r}. {nearest(str(name), known)}".rstrip(), param=param)
    if problem["type"] == "missing":
        return InputError(f"The field {param!r} is required and missing.", param=param)
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict | list) else f" = {_short(problem['input'])}"
    return InputError(f"{param}{shown}: {message[:1].lower()}{message[1:]}.".replace("..", "."), param=param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "body"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
