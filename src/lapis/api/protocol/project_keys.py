"""OpenAI's objects of a project's credentials: its API keys, and its service accounts with theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from lapis.api.protocol.generation import Body
from lapis.api.protocol.lists import Listed
from lapis.api.protocol.organization import Lifetime, Name, whole
from lapis.errors import InputError
from lapis.gateway.organization import KeyOwner, OwnedKey
from lapis.tenants.keys import ApiKey
from lapis.tenants.secret import redacted
from lapis.tenants.service_accounts import ServiceAccount
from lapis.tenants.tenant import Role, Scope

READ_ALL = "api.all.read"  # OpenAI's name for a key that only reads
Scopes = Annotated[list[str], Field(max_length=100)]


class OwnerObject(Listed):
    """A service account that a key belongs to."""

    name: str
    role: str
    created_at: int


class UserOwnerObject(OwnerObject):
    """A user that a key belongs to."""

    email: str


class OwnerFacts(BaseModel):
    """Whose a key is; all null where it is the project's own."""

    type: Literal["user", "service_account"] | None
    user: UserOwnerObject | None
    service_account: OwnerObject | None


class KeyObject(Listed):
    """A key of a project, without its secret."""

    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    name: str
    redacted_value: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: OwnerFacts
    owner_project_access: Literal["active", "inactive"]


def key_object(found: OwnedKey) -> KeyObject:
    """A key as OpenAI's object."""
    key = found.key
    kind: Literal["user", "service_account"] | None = None
    if key.user_id is not None or key.service_account_id is not None:
        kind = "service_account" if key.user_id is None else "user"
    return KeyObject(
        id=key.id,
        name=key.name,
        redacted_value=redacted(key.prefix),
        created_at=int(key.created_at),
        expires_at=whole(key.expires_at),
        last_used_at=whole(key.last_used_at),
        owner=OwnerFacts(
            type=kind,
            user=None
            if found.user is None
            else UserOwnerObject(**_facts(found.user), email=found.user.email),
            service_account=None
            if found.service_account is None
            else OwnerObject(**_facts(found.service_account)),
        ),
        owner_project_access="active" if found.has_access else "inactive",
    )


class KeyFields(Body):
    """What of a key can be changed."""

    scopes: Scopes | None = None
    expires_in_seconds: Lifetime | None = None


class NewKeyObject(Listed):
    """A key of a service account with its text, which is shown this once."""

    object: Literal["organization.project.service_account.api_key"] = (
        "organization.project.service_account.api_key"
    )
    name: str
    created_at: int
    expires_at: int | None
    value: str


def new_key_object(key: ApiKey, text: str) -> NewKeyObject:
    """A key that was just made."""
    return NewKeyObject(
        id=key.id,
        name=key.name,
        created_at=int(key.created_at),
        expires_at=whole(key.expires_at),
        value=text,
    )


class NewKeyFields(Body):
    """What another key of a service account is made with."""

    name: Name = "Secret Key"
    scopes: Scopes | None = None
    expires_in_seconds: Lifetime | None = None


class ServiceAccountObject(Listed):
    """A service account."""

    object: Literal["organization.project.service_account"] = "organization.project.service_account"
    name: str
    role: Literal["owner", "member", "none"]
    created_at: int


class NewServiceAccountObject(ServiceAccountObject):
    """A service account with its first key, if it was to have one."""

    api_key: NewKeyObject | None


def service_account_object(account: ServiceAccount) -> ServiceAccountObject:
    """A service account as OpenAI's object."""
    return ServiceAccountObject(
        id=account.id,
        name=account.name,
        role=account.role,  # type: ignore[arg-type]
        created_at=int(account.created_at),
    )


class NewServiceAccountFields(Body):
    """What a service account is made with."""

    name: Name
    create_service_account_only: bool | None = None
    expires_in_seconds: Lifetime | None = None


class ServiceAccountFields(Body):
    """What of a service account can be changed."""

    name: Name | None = None
    role: Literal["member", "owner"] | None = None


def read_scopes(names: Sequence[str] | None) -> Sequence[str]:
    """Our scopes for those of a request: ours, or OpenAI's `api.all.read`; none means all that a member has.

    Raises InputError for `admin`, which no key of a project gets this way.
    """
    if not names:
        return sorted(Role.MEMBER.scopes)
    if Scope.ADMIN in names:
        raise InputError("A project's key does not administrate; make an admin key.", param="scopes")
    found: set[str] = set()
    for name in names:
        found |= Role.READER.scopes if name == READ_ALL else {name}
    return sorted(found)


def _facts(owner: KeyOwner) -> dict[str, Any]:
    return {"id": owner.id, "name": owner.name, "role": owner.role, "created_at": int(owner.created_at)}
