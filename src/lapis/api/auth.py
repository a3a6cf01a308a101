"""The caller's identity as a typed parameter of a route; no route parses a key itself."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, cast
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from lapis.errors import AuthError
from lapis.gateway.services import Services
from lapis.tenants.admin_keys import Administrator
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope


def services_of(request: Request) -> Services:
    """The services that this app was made over."""
    return cast(Services, request.app.state.services)


async def _services(request: Request) -> Services:  # FastAPI would call what is not async in a thread
    return services_of(request)


async def identify(request: Request) -> Identity:
    """The caller, by key or as the local user. Raises AuthError."""
    known = getattr(request.state, "identity", None)  # what the server asks itself, see api/inside.py
    if known is not None:
        return cast(Identity, known)
    key, admission = _key(request), services_of(request).admission
    if admission.quick(key):
        return admission.identify(key)
    return await run_in_threadpool(admission.identify, key)


def administrate(request: Request) -> Administrator:
    """Who administrates, by admin key or as the local user; a reader only looks. Raises AuthError.

    It reads the database: runs in a thread.
    """
    key = _key(request)
    return services_of(request).admission.administrator(key)


def _key(request: Request) -> str | None:
    admission = services_of(request).admission
    if not admission.keys_required and not is_local(request):
        raise HTTPException(403, "Without API keys this server answers only to localhost.")
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme and scheme.lower() != "bearer":
        raise AuthError("Only bearer keys are accepted.", hint="Send `Authorization: Bearer KEY`.")
    return key.strip() or None


def _owner(request: Request) -> Administrator:
    administrator = administrate(request)
    try:
        administrator.require_owner()
    except AuthError as error:  # known, but may only look
        raise HTTPException(403, str(error)) from error
    return administrator


async def _reader(request: Request) -> Identity:
    return await _with(Scope.MODELS_READ, request)


async def _user(request: Request) -> Identity:
    return await _with(Scope.MODELS_USE, request)


async def _viewer(request: Request) -> Identity:
    return await _with(Scope.WORK_READ, request)


async def _worker(request: Request) -> Identity:
    return await _with(Scope.WORK_WRITE, request)


async def _admin(request: Request) -> Identity:
    return await _with(Scope.ADMIN, request)


async def _with(scope: Scope, request: Request) -> Identity:
    identity = await identify(request)
    permit(identity, scope)
    return identity


def permit(identity: Identity, scope: Scope) -> None:
    """Raises HTTPException (403) for a caller who is known and may just not do this."""
    try:
        identity.require(scope)
    except AuthError as error:
        raise HTTPException(403, str(error).replace("\n", " ")) from error


def is_local(connection: HTTPConnection) -> bool:
    """Whether a request names this machine as its host: a web page that points its own name at us does not."""
    try:
        host = urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
    except ValueError:
        # An address whose bracket is not closed.
        return False
    return host == "localhost" or _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


ServicesOf = Annotated[Services, Depends(_services)]
Reader = Annotated[Identity, Depends(_reader)]
User = Annotated[Identity, Depends(_user)]
Viewer = Annotated[Identity, Depends(_viewer)]  # may see the project's work
Worker = Annotated[Identity, Depends(_worker)]  # may make and end it
Admin = Annotated[Identity, Depends(_admin)]
OrganizationReader = Annotated[Administrator, Depends(administrate)]  # may look at all of an organization
OrganizationOwner = Annotated[Administrator, Depends(_owner)]  # may change it
