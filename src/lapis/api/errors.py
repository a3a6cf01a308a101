"""Every failure as OpenAI's error object: `{"error": {message, type, param, code}}`, all four keys always."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lapis.api.rate_limits import limit_headers
from lapis.errors import LapisError, LimitError, UnavailableError
from lapis.log import logger
from lapis.tenants.quota import QuotaError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}
CODES = {
    408: "request_timeout",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    501: "not_offered",
}


class ErrorFacts(BaseModel):
    """What went wrong; `param` is the field that is to blame."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorFacts


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object for a status."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def lapis_error_body(error: LapisError) -> dict[str, Any]:
    """OpenAI's error object for one of our errors: cause and hint in one message."""
    message = f"{error.message} {error.hint}".strip()
    return error_body(message, error.http_status, param=error.param, code=error_code(error))


def error_code(error: LapisError) -> str:
    """Our stable code, under OpenAI's name where its client or users look for one."""
    names = {"unauthorized": "invalid_api_key", "rate_limited": "rate_limit_exceeded"}
    if error.code == "not_found" and error.param == "model":
        return "model_not_found"
    if error.code == "not_found" and error.param == "previous_response_id":
        return "previous_response_not_found"
    return names.get(error.code, error.code)


def error_headers(error: LapisError) -> dict[str, str]:
    """When to come back and what is left of the limits, and for a wrong key how to sign in."""
    if isinstance(error, LimitError | UnavailableError) and error.retry_after is not None:
        seconds = max(error.retry_after, 0.001)
        later = {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}
        return {**later, **(limit_headers(error.limits) if isinstance(error, QuotaError) else {})}
    if error.http_status == 401:
        return {"www-authenticate": "Bearer"}
    # The official client repeats 409, 429 and 5xx by itself; these would only fail again.
    return {"x-should-retry": "false"} if error.http_status in (409, 429, 500) else {}


def add_error_handlers(app: FastAPI) -> None:
    """Answer our own errors and the framework's in one shape; anything else is a bug (see middleware)."""
    app.add_exception_handler(LapisError, _on_lapis_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)


async def _on_lapis_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LapisError)
    if error.http_status >= 500:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse(lapis_error_body(error), error.http_status, error_headers(error))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404 and message == "Not Found":
        message = f"There is no {request.method} {request.url.path} here."
    if error.status_code == 405:
        message = f"{request.method} is not allowed for {request.url.path}."
    body = error_body(message, error.status_code, code=CODES.get(error.status_code))
    return JSONResponse(body, error.status_code, _plain(error.headers))


async def _on_wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    """A parameter of the path or the query; bodies are read by `json_body`."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    name = str(problem["loc"][-1]).removesuffix("[]")
    message = f"{name}: {problem['msg'][:1].lower()}{problem['msg'][1:]}."
    return JSONResponse(error_body(message, 400, param=name, code="bad_input"), 400)


def _plain(headers: Mapping[str, str] | None) -> dict[str, str]:
    return dict(headers or {})
